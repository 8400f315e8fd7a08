"""TLS to PostgreSQL and to Centrifugo: only a server that proves to be the one that was meant hears or says anything.

Debian's PostgreSQL, because the embedded one is built without OpenSSL; the certificates come from an authority that
lives as long as the tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox_relay.build import build_publisher
from outbox_relay.config import ConfigError, load
from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.doctor import Finding, examine, privacy
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.event import Outage
from outbox_relay.migrations import migrate
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from tests.conftest import MakeRelay, RunRelay, sqlalchemy_engine
from tests.support.authority import Authority, Certificate, centrifugo_with
from tests.support.programs import debian_program
from tests.support.waiting import wait_until
from tests.support.writing import states, write

REFUSED: dict[str, tuple[Callable[[Authority], Certificate], str, str]] = {
    "for another host": (Authority.for_another_host, "does not match host name", "IP address mismatch"),
    "expired": (Authority.expired, "certificate verify failed", "certificate has expired"),
    "self-signed": (Authority.self_signed, "certificate verify failed", "self-signed certificate"),
}
"""A certificate, and what is said of it by libpq and by Python."""


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class TlsPostgres:
    """Debian's PostgreSQL, which shows whatever certificate it is given."""

    def __init__(self, postgres: Postgres, authority: Authority) -> None:
        self._postgres = postgres
        self._authority = authority
        self._admin = psycopg.connect(host=str(postgres.run_dir), port=postgres.port, user="postgres", autocommit=True)
        self._admin.execute("ALTER SYSTEM SET ssl = on")  # once there is a certificate

    def close(self) -> None:
        self._admin.close()

    def url(self, **parameters: str) -> str:
        given = {"sslmode": "verify-full", "sslrootcert": str(self._authority.trusted)} | parameters
        return f"{self._postgres.url()}?{'&'.join(f'{name}={value}' for name, value in given.items())}"

    def show(self, certificate: Certificate) -> None:
        """From the next connection on."""
        folder = self._postgres.data_dir
        owner = folder.stat()
        for source, name in zip(certificate, ("server.crt", "server.key"), strict=True):
            target = folder / name
            shutil.copyfile(source, target)
            target.chmod(0o600)
            os.chown(target, owner.st_uid, owner.st_gid)
        before = self._ask("SELECT pg_conf_load_time()")
        self._ask("SELECT pg_reload_conf()")
        wait_until(lambda: self._ask("SELECT pg_conf_load_time()") != before, "PostgreSQL has read its files again")

    def _ask(self, query: str) -> Any:
        return self._admin.execute(query.encode()).fetchone()


@pytest.fixture(scope="session")
def tls_postgres(authority: Authority) -> Iterator[TlsPostgres]:
    binaries = debian_program("postgres", "postgresql").resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTBOX_RELAY_PGBIN", str(binaries))
        with Postgres() as postgres:
            patch.delenv("OUTBOX_RELAY_PGBIN")
            with closing(TlsPostgres(postgres, authority)) as server:
                server.show(authority.good())
                migrate(sqlalchemy_engine(postgres.url()))
                yield server


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PGSSL")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_variables")
def test_a_relay_delivers_over_tls_to_both_sides(
    tls_postgres: TlsPostgres,
    authority: Authority,
    centrifugo_binary: Path,
    make_relay: MakeRelay,
    tmp_path: Path,
) -> None:
    """Names and signatures are verified on both sides, and `check` says so of the database."""
    tls_postgres.show(authority.good())
    with centrifugo_with(authority.good(), centrifugo_binary, tmp_path) as address:
        settings = load(
            {
                "database_url": tls_postgres.url(),
                "centrifugo_url": f"https://{address}",
                "centrifugo_api_key": "key",
                "centrifugo_ca_file": str(authority.trusted),
            },
            environ={},
        )
        findings = list(examine(settings))
        assert [finding for finding in findings if not finding.ok] == []
        assert Finding(True, "TLS, and the certificate is for this host") in findings
        with psycopg.connect(tls_postgres.url(), autocommit=True) as connection:
            write(connection, "1", 1, "hist:a")
            with closing(build_publisher(settings)) as publisher, closing(Store(tls_postgres.url())) as store:
                with store.batch():
                    lanes = store.claim(after=0, lanes=256).lanes
                    events = store.read(lanes, events=10, per_lane=10, max_bytes=1_000).events
                    replies = publisher.publish(events)
                    assert not isinstance(replies, Outage)
                    assert [reply.refusals for reply in replies] == [()]
                    store.settle([event.id for event in events], [], {})
                sessions = "pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_addr IS NOT NULL"
                encrypted = connection.execute(f"SELECT count(*), bool_and(ssl) FROM {sessions}".encode()).fetchone()
                assert encrypted == (2, True)
            assert states(connection) == {"delivered": 1}


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize(("certificate", "said"), [(c, said) for c, said, _ in REFUSED.values()], ids=REFUSED)
def test_a_database_that_proves_nothing_is_refused(
    certificate: Callable[[Authority], Certificate], said: str, tls_postgres: TlsPostgres, authority: Authority
) -> None:
    """Before a password could be sent. (It is the verification that refuses: who asks for none gets in.)"""
    tls_postgres.show(certificate(authority))
    Store(tls_postgres.url(sslmode="require", sslrootcert="")).close()
    with pytest.raises(DatabaseUnavailableError, match=said):
        Store(tls_postgres.url())


@pytest.mark.usefixtures("no_variables")
def test_a_database_whose_authority_is_unknown_is_refused(
    tls_postgres: TlsPostgres, authority: Authority, tmp_path: Path
) -> None:
    """Another authority's word does not count; without `verify-full` nobody asks, and `check` says that."""
    tls_postgres.show(authority.good())
    other = Authority(tmp_path)
    with pytest.raises(DatabaseUnavailableError, match="certificate verify failed"):
        Store(tls_postgres.url(sslrootcert=str(other.trusted)))
    unverified = tls_postgres.url(sslmode="require", sslrootcert="")
    settings = load(
        {"database_url": unverified, "centrifugo_url": "http://127.0.0.1:1", "centrifugo_api_key": "key"}, environ={}
    )
    said = [finding.what for finding in examine(settings)]
    assert "TLS, but whose certificate it is goes unexamined: sslmode is require" in said


@pytest.mark.parametrize(("certificate", "said"), [(c, said) for c, _, said in REFUSED.values()], ids=REFUSED)
def test_a_centrifugo_that_proves_nothing_is_refused(
    certificate: Callable[[Authority], Certificate],
    said: str,
    authority: Authority,
    centrifugo_binary: Path,
    tmp_path: Path,
) -> None:
    """An outage, said with its reason; the key was not sent."""
    with centrifugo_with(certificate(authority), centrifugo_binary, tmp_path) as address:
        outage = probe(address, str(authority.trusted))
    assert outage is not None
    assert said in outage.reason


def test_a_centrifugo_whose_authority_is_unknown_is_refused(
    authority: Authority, centrifugo_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public authorities do not know ours, and no variable of the environment adds one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.trusted))
    with centrifugo_with(authority.good(), centrifugo_binary, tmp_path) as address:
        outage = probe(address, None)
        assert outage is not None
        assert "unable to get local issuer certificate" in outage.reason
        assert probe(address, str(authority.trusted)) is None


def probe(address: str, ca_file: str | None) -> Outage | None:
    settings = load(
        {"centrifugo_url": f"https://{address}", "centrifugo_api_key": "key", "centrifugo_ca_file": ca_file}, environ={}
    )
    with closing(build_publisher(settings)) as publisher:
        return publisher.probe()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read: No such file"), ("no PEM", "holds no certificates")]
)
def test_a_file_of_authorities_that_is_none(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "authorities"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"centrifugo_ca_file: it {said}"):
        probe("127.0.0.1:1", str(file))


@pytest.mark.parametrize(
    ("host", "encrypted", "mode", "what", "advised"),
    [
        ("db.example", True, "verify-full", "TLS, and the certificate is for this host", False),
        (
            "db.example",
            True,
            "verify-ca",
            "TLS, but whose certificate it is goes unexamined: sslmode is verify-ca",
            True,
        ),
        ("db.example", True, "prefer", "TLS, but whose certificate it is goes unexamined: sslmode is prefer", True),
        ("db.example", False, "prefer", "no TLS to PostgreSQL", True),
        ("10.0.0.1", False, "disable", "no TLS to PostgreSQL", True),
        ("127.0.0.1", False, "prefer", "PostgreSQL is on this host: no TLS", False),
        ("/run/postgresql", False, "prefer", "PostgreSQL is on this host: no TLS", False),
    ],
)
def test_check_says_who_may_listen(host: str, encrypted: bool, mode: str, what: str, advised: bool) -> None:
    """A finding that is no problem by itself: a private network may be trusted."""
    finding = privacy(host, encrypted=encrypted, mode=mode)
    assert (finding.ok, finding.what, bool(finding.advice)) == (True, what, advised)


def test_no_proxy_of_the_environment_hears_anything(
    database_url: str, centrifugo: Centrifugo, gateway: Any, run_relay: RunRelay, channel: str, monkeypatch: Any
) -> None:
    """Whatever the shell, the container or a netrc file say: the request goes to the address of the setting."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, gateway.url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        write(connection, "1", 1, channel)
        assert run_relay() is Ended.EMPTY
        assert states(connection) == {"delivered": 1}
    assert gateway.requests == []
