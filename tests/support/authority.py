"""A certificate authority for one test run, made with openssl, and servers that show its certificates."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from outbox_relay.embedded._process import Process, on_free_ports
from tests.support.programs import debian_program

_CONFIG = """\
[ca]
default_ca = own
[own]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
[authority]
basicConstraints = critical, CA:TRUE
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
authorityKeyIdentifier = keyid
subjectAltName = ${{ENV::NAMES}}
"""


class Certificate(NamedTuple):
    """Two PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for servers on 127.0.0.1. `trusted` is what a client has to trust."""

    def __init__(self, folder: Path) -> None:
        self._openssl = debian_program("openssl", "openssl")
        self._folder = folder
        self._config = folder / "config"
        self._config.write_text(_CONFIG.format(folder=folder))
        (folder / "index.txt").touch()
        self._own = self._sign("authority", names="", extensions="authority", selfsigned=True)
        self.trusted = self._own.certificate

    def good(self) -> Certificate:
        return self._sign("good")

    def for_another_host(self) -> Certificate:
        return self._sign("another", names="DNS:elsewhere.test,IP:127.0.0.2")

    def expired(self) -> Certificate:
        return self._sign("expired", first="20200101000000Z", last="20200102000000Z")

    def self_signed(self) -> Certificate:
        return self._sign("selfsigned", selfsigned=True, extensions="server")

    def _sign(
        self,
        subject: str,
        *,
        names: str = "IP:127.0.0.1,DNS:localhost",
        extensions: str = "server",
        first: str = "20200101000000Z",
        last: str = "21200101000000Z",
        selfsigned: bool = False,
    ) -> Certificate:
        made = Certificate(self._folder / f"{subject}.pem", self._folder / f"{subject}.key")
        request = self._folder / f"{subject}.csr"
        config = ("-config", self._config)
        self._run(names, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", made.key)
        self._run(names, "req", "-new", "-key", made.key, "-subj", f"/CN={subject}", "-out", request, *config)
        signer: tuple[str | Path, ...] = ("-selfsign", "-keyfile", made.key)
        if not selfsigned:
            signer = ("-cert", self._own.certificate, "-keyfile", self._own.key)
        validity = ("-startdate", first, "-enddate", last)
        files = ("-in", request, "-out", made.certificate, "-notext")
        self._run(names, "ca", "-batch", *config, "-extensions", extensions, *validity, *signer, *files)
        return made

    def _run(self, names: str, *arguments: str | Path) -> None:
        ended = subprocess.run(
            [self._openssl, *arguments], env={"NAMES": names or "DNS:none"}, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr


@contextmanager
def centrifugo_with(certificate: Certificate, binary: Path, folder: Path) -> Iterator[str]:
    """A Centrifugo whose only port speaks TLS; its address, which takes the API key `key`."""
    config = folder / "config.json"
    started: list[Process] = []

    def launch(ports: list[int]) -> None:
        tls = {"enabled": True, "cert_pem": str(certificate.certificate), "key_pem": str(certificate.key)}
        server = {"address": "127.0.0.1", "port": ports[0], "tls": tls}
        namespaces = [{"name": "hist", "history_size": 10, "history_ttl": "60s"}]
        config.write_text(
            json.dumps(
                {
                    "http_server": server,
                    "http_api": {"key": "key", "external": True},
                    "channel": {"namespaces": namespaces},
                }
            )
        )
        process = Process((binary, "-c", config), log=folder / "log", cwd=folder, env={})
        started.append(process)
        process.wait_until(lambda: _speaks_tls(ports[0]), 20, "Centrifugo")

    [port] = on_free_ports(1, launch)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for process in started:
            process.stop(signal.SIGKILL, 10)


def _speaks_tls(port: int) -> bool:
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as plain, trusting.wrap_socket(plain):
            return True
    except OSError:
        return False
