"""Where a worker is, level by level: its host, rack, zone. Sources near to it are taken first, or they alone.

MX_P2P_TOPOLOGY says it in one of three ways: a list (`zone=a,rack=r7,host=n3`), a JSON object, as for NVIDIA's
ModelExpress, or the path of what Kubernetes' downward API writes: a file of labels (`key="value"`, a line
each, https://kubernetes.io/docs/concepts/workloads/pods/downward-api/) or a folder with a file for each label. Of a
label's key the part behind the last `/` counts, without `topology-` before it; `hostname` is the host.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mxcore.settings import WorkerSettings
from mxcore.transfer.route import host_identity
from mxserver.wire.calls import Near, shared_levels

__all__ = ["Place", "current_place"]

logger = logging.getLogger(__name__)

HOST = "host"
_LONGEST = 256  # characters of a value
_LONGEST_NAME = 253  # of a name in DNS, and so in Kubernetes
_LABEL = re.compile(r'\s*(?P<key>[^=\s]+)\s*=\s*(?P<value>"(?:[^"\\]|\\.)*"|[^,\n]*)')


@dataclass(frozen=True)
class Place:
    """A worker's place. `levels` are names from broad to narrow, `required` is the one that sources must share.

    `names` are those of its pod and its node, for people; empty where they are not known.
    """

    topology: Mapping[str, str]
    levels: tuple[str, ...]
    required: str = ""
    names: tuple[str, str] = ("", "")

    def distance(self, topology: Mapping[str, str]) -> int:
        """0: the narrowest level is the same; one more for each level that is broader; the most: none is the same."""
        return len(self.levels) - shared_levels(self.topology, topology, self.levels)

    def allows(self, topology: Mapping[str, str]) -> bool:
        """Whether a source there may be taken. False also where either does not know its own required level."""
        return not self.required or shared_levels(self.topology, topology, (self.required,)) > 0

    @property
    def domain(self) -> str:
        """Where its sources must be, as `zone=a`; empty: anywhere."""
        return f"{self.required}={self.topology.get(self.required, '')}" if self.required else ""

    @property
    def problem(self) -> str:
        """Why no source at all may be taken; empty: some may."""
        if not self.required or self.topology.get(self.required):
            return ""
        return (
            f"this worker does not know its own {self.required} (MX_P2P_TOPOLOGY), which its sources must share "
            "(MX_P2P_TOPOLOGY_DOMAIN): it takes weights from no other worker"
        )

    def near(self, worker_id: str) -> Near:
        """What the server is told, so that it lists the nearest."""
        return Near(worker_id, self.topology, self.levels)


def current_place(settings: WorkerSettings) -> Place:
    """This worker's place as it is known now: files of the downward API may be written, or change, while it runs.

    Whoever names no host is on the one that the kernel identifies (its boot id). Never raises: what cannot be read is
    logged, and not known.
    """
    levels = tuple(settings.topology_levels)
    if settings.topology_required and settings.topology_required not in levels:
        levels = (settings.topology_required, *levels)
    told = settings.topology
    try:
        pairs = _of_path(Path(told)) if told.startswith("/") else _of_text(told)
    except (OSError, ValueError) as error:
        logger.warning("MX_P2P_TOPOLOGY=%s says no place: %s", told, error)
        pairs = ()
    topology = {level: value[:_LONGEST] for key, value in pairs if value and (level := _level(key)) in levels}
    named = _names(settings, next((value for key, value in pairs if _level(key) == HOST), ""))
    if HOST in levels:
        with suppress(OSError):
            topology.setdefault(HOST, host_identity()[0])
    return Place(topology, levels, settings.topology_required, named)


def _names(settings: WorkerSettings, host: str) -> tuple[str, str]:
    """This pod and its node. In a pod HOSTNAME is the pod's name; elsewhere this machine's name is the node's."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    pod = settings.pod_name or (socket.gethostname() if in_pod else "")
    node = settings.node_name or host or ("" if in_pod else socket.gethostname())
    return pod[:_LONGEST_NAME], node[:_LONGEST_NAME]


def _of_path(path: Path) -> Iterable[tuple[str, str]]:
    if not path.is_dir():
        return _labels(path.read_text())
    # A folder of the downward API is links to files in a folder whose name begins with two dots.
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and file.is_file()]
    labels = [file for file in files if file.name == "labels"]
    return _labels(labels[0].read_text()) if labels else [(file.name, file.read_text().strip()) for file in files]


def _of_text(text: str) -> Iterable[tuple[str, str]]:
    if not text.startswith("{"):
        return _labels(text.replace(",", "\n"))
    values = json.loads(text)
    return [(key, str(value)) for key, value in values.items()]


def _labels(text: str) -> list[tuple[str, str]]:
    pairs = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if (found := _LABEL.fullmatch(line)) is None:
            raise ValueError(f"{line!r} is no key=value")
        value = found["value"].strip()
        pairs.append((found["key"], str(json.loads(value)) if value.startswith('"') else value))
    return pairs


def _level(key: str) -> str:
    name = key.rpartition("/")[2].rpartition("topology-")[2]
    return HOST if name == "hostname" else name
