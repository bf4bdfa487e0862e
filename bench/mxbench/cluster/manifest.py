"""The Kubernetes manifest of the same bench: an indexed Job, whose first pod measures what the others let it start."""

from __future__ import annotations

from collections.abc import Sequence

from mxbench.hosts import DEFAULT_PORT

__all__ = ["manifest"]

_TEXT = """\
# A pod a node: `kubectl apply -f` it, and `kubectl logs -f job/{name}` has the result. Pods find each other by the
# headless service. For RDMA and GPUs add your device plugin's resources to `limits`, and IPC_LOCK if memory may
# not be pinned (`mx doctor` says so).
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {{app.kubernetes.io/name: {name}}}
  ports:
    - {{name: agent, port: {port}}}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: {name}}}
spec:
  completionMode: Indexed
  completions: {count}
  parallelism: {count}
  backoffLimit: 0
  activeDeadlineSeconds: {seconds}
  template:
    metadata:
      labels: {{app.kubernetes.io/name: {name}}}
    spec:
      subdomain: {name}
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false
      affinity:
        podAntiAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: kubernetes.io/hostname
              labelSelector:
                matchLabels: {{app.kubernetes.io/name: {name}}}
      containers:
        - name: bench
          image: {image}
          command: [{command}]
          ports:
            - {{name: agent, containerPort: {port}}}
          resources:
            requests: {{cpu: "2", memory: {memory_mib}Mi}}
            limits: {{memory: {memory_mib}Mi}}
          volumeMounts:
            - {{name: shm, mountPath: /dev/shm}}
      volumes:
        - name: shm
          emptyDir: {{medium: Memory}}
"""


def manifest(name: str, image: str, count: int, size_bytes: int, seconds: int, arguments: Sequence[str]) -> str:
    """YAML. `arguments`: those of `mx bench cluster` in the first pod."""
    template = f"{name}-{{index}}.{name}"
    words = ["python3", "-m", "mxbench.cluster.pod", "--count", str(count), "--named", template, "--", *arguments]
    return _TEXT.format(
        name=name,
        image=image,
        count=count,
        port=DEFAULT_PORT,
        seconds=seconds,
        memory_mib=2048 + 3 * size_bytes // 2**20,
        command=", ".join(f'"{word}"' for word in words),
    )
