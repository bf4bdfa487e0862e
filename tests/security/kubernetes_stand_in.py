"""An HTTPS server that speaks TokenReview as Kubernetes' API server does."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mxbench.stand_ins.authority import Authority


def jwt(name: str, **claims: object) -> str:
    """A token as Kubernetes makes them, for a made-up issuer; its signature is its name."""
    fields = {"iss": "https://kubernetes.default.svc", "sub": name, **claims}
    parts = [json.dumps({"alg": "RS256"}).encode(), json.dumps(fields).encode(), name.encode()]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


OWN_TOKEN = jwt("the-server's-own")


class ApiServer:
    """Knows the tokens in `users` (token -> status.user), counts reviews, and can be told to fail."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.users: dict[str, dict[str, Any]] = {}
        self.audiences = ["https://kubernetes.default.svc"]
        self.reviews: list[dict[str, Any]] = []
        self.connections = 0
        self.answer: tuple[int, bytes] | None = None  # instead of the right one
        self.hold: threading.Event | None = None
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "token").write_text(OWN_TOKEN + "\n")
        (self.account / "ca.crt").write_bytes(authority.ca_file.read_bytes())
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                stand_in.connections += 1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stand_in.hold is not None:
                    stand_in.hold.wait(120)
                status, content = stand_in.judge(self.path, self.headers.get("Authorization"), body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base's name
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("api-server", "127.0.0.1"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_port}"
        self.environ = {  # as in every container of a cluster
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self._server.server_port),
        }
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def judge(self, path: str, authorization: str | None, body: dict[str, Any]) -> tuple[int, bytes]:
        self.reviews.append(body)
        if self.answer is not None:
            return self.answer
        if path != "/apis/authentication.k8s.io/v1/tokenreviews" or authorization != f"Bearer {OWN_TOKEN}":
            return 403, b"{}"
        assert (body["apiVersion"], body["kind"]) == ("authentication.k8s.io/v1", "TokenReview")
        user = self.users.get(body["spec"]["token"])
        asked = body["spec"].get("audiences")
        status: dict[str, Any] = {"authenticated": False, "error": "invalid bearer token"}
        audiences = [name for name in self.audiences if asked is None or name in asked]
        if user is not None and audiences:
            status = {"authenticated": True, "user": user, "audiences": audiences}
        return 201, json.dumps({**body, "status": status}).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def service_account(namespace: str, name: str, pod: str = "") -> dict[str, Any]:
    """status.user of a token of a service account, bound to a pod or not."""
    extra = {"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": ["u"]}
    return {
        "username": f"system:serviceaccount:{namespace}:{name}",
        "uid": "0",
        "groups": ["system:serviceaccounts"],
        **({"extra": extra} if pod else {}),
    }
