# SPDX-License-Identifier: Apache-2.0
"""The guard in front of Flower: which requests from outside reach the SuperLink at all, as an nginx configuration.

Flower 1.41 serves three interfaces on one port: Fleet for nodes, Control and Runtime for operators, the last two
without authentication. Its node signature covers a timestamp only, so one that was seen can be used again for 305 s
with any other request. The guard closes both:

    1. TLS with a client certificate of this consortium that is not revoked, in every handshake (no resumption)
    2. only the ten Fleet paths that a registered node uses; everything else is 403
    3. the certificate's serial number and the Flower key in the header must be a pair that enrolment wrote down, so
       a signature is of no use to anyone but the hospital that made it
    4. limits: size of a request, requests and connections per certificate and address, time to send header and body

Without a list of revoked certificates, or with one that is out of date, nginx refuses everybody.
"""

import base64
import signal
import subprocess
import time

import psutil
from cryptography.hazmat.primitives.serialization import Encoding

from ..privacy.errors import EnvironmentProblem
from ..privacy.identity import replace_file
from .consortium import Consortium, Issuer

__all__ = ["FLEET_PATHS", "bindings", "check_guard", "nginx_config", "publish", "reload_guard"]

RELOAD_SECONDS = 3.0
"""nginx takes about 50 ms."""

FLEET_PATHS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
"""``register-node`` and ``unregister-node`` are for nodes without keys; here the enrolment service registers."""

_TEMPLATE = """\
# FedNeuro guard of consortium {name}. Printed by `fedneuro-server proxy nginx`; do not edit, set server.toml.
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_processes auto;
worker_shutdown_timeout 15s;   # a revoked hospital's open connections end within this time
events {{ worker_connections 2048; }}

http {{
    server_tokens off;
    log_format guard '$time_iso8601 $remote_addr "$ssl_client_s_dn" $ssl_client_verify $status $request_method '
                     '$uri $request_length $body_bytes_sent $request_time';
    access_log {folder}/access.log guard;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;

    # A certificate and the Flower key that belongs to it.
    map_hash_bucket_size 1024;
    map_hash_max_size 8192;
    map "$ssl_client_serial:$http_flwr_public_key" $bound {{
        default 0;
        include {folder}/bindings.conf;
    }}

    limit_req_zone $ssl_client_serial zone=certificate:4m rate=200r/s;
    limit_conn_zone $binary_remote_addr zone=address:4m;
    limit_req_status 429;
    limit_conn_status 429;

    client_header_timeout 10s;
    client_body_timeout 15s;
    send_timeout 30s;
    keepalive_timeout 75s;
    client_header_buffer_size 4k;
    large_client_header_buffers 4 8k;
    client_max_body_size {size}m;
    client_body_buffer_size {size}m;   # in memory: nothing of a hospital's update is written to this disk
    proxy_max_temp_file_size 0;

    upstream superlink {{
        server 127.0.0.1:{superlink};
        keepalive 32;
    }}

    server {{
        listen {listen}:{port} ssl backlog=256;
        server_name {host};
        ssl_certificate {base}/tls/server.crt;
        ssl_certificate_key {base}/tls/server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
        ssl_session_cache off;
        ssl_session_tickets off;
        ssl_verify_client on;
        ssl_verify_depth 2;
        ssl_client_certificate {folder}/trust.pem;
        ssl_crl {folder}/revoked.pem;
        limit_conn address 64;

        location / {{ return 403; }}

        location ~ ^/v1/fleet/({paths})$ {{
            if ($bound = 0) {{ return 403; }}
            limit_except POST {{ deny all; }}
            limit_req zone=certificate burst=400 nodelay;
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header flwr-public-key $http_flwr_public_key;   # one value: the one that was compared
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 2;
            proxy_ssl_name localhost;
            proxy_ssl_trusted_certificate {base}/ca/root.crt;
            proxy_ssl_session_reuse on;
            proxy_request_buffering on;   # a slow sender holds a buffer here, never a thread of Flower
            proxy_connect_timeout 5s;
            proxy_read_timeout 60s;
        }}
    }}
}}
"""


def nginx_config(consortium: Consortium) -> str:
    """The whole configuration file."""
    settings, folder = consortium.settings, consortium.folder / "guard"
    return _TEMPLATE.format(
        name=consortium.name,
        folder=folder,
        base=consortium.folder,
        host=settings.server.host,
        listen=settings.server.listen,
        port=settings.ports.guard,
        superlink=settings.ports.superlink,
        size=settings.guard.max_request_mib,
        paths="|".join(FLEET_PATHS),
    )


def bindings(consortium: Consortium) -> str:
    """Which certificate may speak with which Flower key: one line of an nginx map for each pair that holds."""
    now = time.time()
    keys = {site.name: site.node_key for site in consortium.registry.sites() if site.state == "enrolled"}
    pairs = [
        f'"{record.serial}:{base64.b64encode(keys[record.site].encode()).decode()}" 1;  # {record.site}\n'
        for record in consortium.registry.certificates()
        if record.revoked is None and record.not_after > now and keys.get(record.site)
    ]
    return "".join(pairs)


def publish(consortium: Consortium, issuer: Issuer | None = None) -> None:
    """Write what the guard reads; without ``issuer`` the signed list of revoked certificates stays as it was.

    Revocation works without it too: a revoked certificate has no line in ``bindings.conf``.
    """
    folder = consortium.folder / "guard"
    # nginx compares the header as it came, so a key's PEM is written exactly as Flower encodes it.
    replace_file(folder / "bindings.conf", bindings(consortium).encode("ascii"))
    trusted = [consortium.root, *(certificate for _, certificate in consortium.issuing())]
    replace_file(folder / "trust.pem", b"".join(found.public_bytes(Encoding.PEM) for found in trusted))
    if issuer is not None:
        registry = consortium.registry
        lists = issuer.revocations(registry.certificates(), number=registry.revision)
        replace_file(folder / "revoked.pem", lists + (consortium.folder / "ca" / "root.crl").read_bytes())
    replace_file(folder / "nginx.conf", nginx_config(consortium).encode())


def check_guard(consortium: Consortium) -> None:
    """Let nginx read its configuration.

    Raises:
        EnvironmentProblem: nginx is not installed, or refuses the configuration.
    """
    program = consortium.settings.guard.nginx
    command = [program, "-t", "-q", "-e", "stderr", "-c", str(consortium.folder / "guard" / "nginx.conf")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603
    except FileNotFoundError as error:
        text = f"guard.nginx: there is no program {program}; apt-get install nginx-light"
        raise EnvironmentProblem(f'{text}, or set guard.nginx = "" and run your own') from error
    if done.returncode:
        raise EnvironmentProblem(
            f"guard: nginx refuses its configuration: {done.stderr.strip().splitlines()[-1][:300]}"
        )


def reload_guard(consortium: Consortium) -> bool:
    """Let a running nginx read its files again, and wait until its old workers take no more requests.

    Returns:
        False where none runs.
    """
    folder = consortium.folder / "guard"
    try:
        master = psutil.Process(int((folder / "nginx.pid").read_text(encoding="ascii")))
        # A number that was left behind may be another program's by now.
        if str(folder / "nginx.conf") not in " ".join(master.cmdline()):
            return False
        old = master.children()
        master.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + RELOAD_SECONDS
        while any(_is_serving(worker) for worker in old) and time.monotonic() < deadline:
            time.sleep(0.01)
    except (OSError, ValueError, psutil.Error):
        return False
    return True


def _is_serving(worker: psutil.Process) -> bool:
    """Whether an nginx worker takes new requests; it names itself otherwise."""
    try:
        return worker.is_running() and "shutting down" not in " ".join(worker.cmdline())
    except psutil.Error:
        return False
