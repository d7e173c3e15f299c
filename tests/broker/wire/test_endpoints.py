"""Endpoints as users write them: errors name the mistake, and no file is overwritten."""

import socket

import pytest

from fedmq.broker.errors import EndpointError, UnresolvedError
from fedmq.broker.wire import endpoints
from fedmq.broker.wire.endpoints import (
    MAX_PATH_BYTES,
    Endpoint,
    listening_address,
    parse_endpoint,
    resolve,
)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://127.0.0.1:7700", Endpoint("", "127.0.0.1", 7700, literal=True)),
        ("tcp://my-host.example.org:1", Endpoint("", "my-host.example.org", 1)),
        ("tcp://my_service:65535", Endpoint("", "my_service", 65535)),
        ("tcp://[::1]:7700", Endpoint("", "::1", 7700, literal=True)),
        ("tcp://[fe80::1%eth0]:7700", Endpoint("", "fe80::1%eth0", 7700, literal=True)),
        ("ipc:///run/fedmq.sock", Endpoint("", path="/run/fedmq.sock")),
        ("ipc://@fedmq", Endpoint("", path="@fedmq")),
    ],
)
def test_valid_endpoints(text, endpoint):
    for listen in (False, True):
        found = parse_endpoint(text, listen=listen)
        assert (found.host, found.port, found.path, found.literal) == (
            endpoint.host,
            endpoint.port,
            endpoint.path,
            endpoint.literal,
        )
        assert found.text == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("127.0.0.1:7733", r"expected tcp://HOST:PORT.*'127.0.0.1:7733'; write tcp://127.0.0.1"),
        ("nonsense", "expected tcp://HOST:PORT or ipc://PATH, got 'nonsense'"),
        ("", "expected tcp://HOST:PORT or ipc://PATH, got ''"),
        ("http://host:80", "expected tcp://HOST:PORT or ipc://PATH"),
        ("tcp:/host:80", "expected tcp://HOST:PORT or ipc://PATH"),
        ("tcp://host", "expected a port"),
        ("tcp://[::1]", "expected a port"),
        ("tcp://host:", "expected a port from 1 to 65535, got ''"),
        ("tcp://host:0", "expected a port from 1 to 65535, got '0'"),
        ("tcp://host:65536", "expected a port from 1 to 65535, got '65536'"),
        ("tcp://host:" + "9" * 5000, "expected a port from 1 to 65535"),
        ("tcp://host:-1", "expected a port"),
        ("tcp://host:٣", "expected a port"),
        ("tcp://host:7700/", "expected a port"),
        ("tcp://::1:7700", r"in brackets, tcp://\[::1\]:7700"),
        ("tcp://[::1", r"in brackets, as in tcp://\[::1\]:7700, got .tcp://\[::1"),
        ("tcp://::1]:7700", "in brackets, as in"),
        ("tcp://[host]:7700", "expected an IPv6 address in the brackets"),
        ("tcp://:7700", "expected a host"),
        ("tcp://two words:7700", "expected a host"),
        ("tcp://a;b:7700", "expected a host"),
        ("tcp://höst:7700", "expected a host"),
        ("tcp://*:7700", "expected the broker's host"),
        ("ipc://", "expected ipc://PATH"),
        ("ipc://@", "expected ipc://PATH"),
        ("ipc://*", "expected ipc://PATH"),
        ("ipc:///" + "x" * MAX_PATH_BYTES, f"at most {MAX_PATH_BYTES} bytes"),
    ],
)
def test_an_invalid_endpoint_is_reported_with_what_was_expected(text, words):
    with pytest.raises(EndpointError, match=words) as caught:
        parse_endpoint(text)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_any_address_and_any_port_are_valid_for_listening():
    for text in ("tcp://*:7700", "tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "ipc://*"):
        parse_endpoint(text, listen=True)
    assert listening_address(parse_endpoint("tcp://*:7700", listen=True)) == ("tcp://*:7700", True)
    assert listening_address(parse_endpoint("tcp://[::1]:1")) == ("tcp://[::1]:1", True)
    assert listening_address(parse_endpoint("tcp://127.0.0.1:1")) == ("tcp://127.0.0.1:1", False)
    # libzmq itself takes no names to listen on.
    assert listening_address(parse_endpoint("tcp://localhost:1"))[0] in (
        "tcp://127.0.0.1:1",
        "tcp://[::1]:1",
    )


def answers(monkeypatch, *found):
    """Make the name server give these answers in turn: an error, or addresses."""
    left = list(found)

    def getaddrinfo(host, port, **_):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [(family, socket.SOCK_STREAM, 6, "", (host, port)) for family in answer]

    monkeypatch.setattr(endpoints.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(endpoints.time, "sleep", lambda _: None)
    return left


AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
NONE = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NAME = parse_endpoint("tcp://broker.example:7700")


def test_a_name_has_the_families_of_its_addresses_in_their_order(monkeypatch):
    four, six = socket.AF_INET, socket.AF_INET6
    answers(monkeypatch, [six], [four, four], [six, four, six])
    assert [resolve(NAME) for _ in range(3)] == [[six], [four], [six, four]]


def test_a_name_that_does_not_resolve_is_reported_at_once_with_the_reason(monkeypatch):
    left = answers(monkeypatch, NONE, [socket.AF_INET])
    with pytest.raises(UnresolvedError, match=r"'broker.example' does not resolve: name or serv"):
        resolve(NAME)
    assert len(left) == 1


def test_an_unreachable_name_server_is_retried_for_a_while(monkeypatch):
    answers(monkeypatch, AGAIN, AGAIN, [socket.AF_INET])
    assert resolve(NAME) == [socket.AF_INET]
    monkeypatch.setattr(endpoints, "RESOLVE_PATIENCE_S", 0.0)
    answers(monkeypatch, AGAIN)
    with pytest.raises(UnresolvedError, match="temporary failure in name resolution"):
        resolve(NAME)


def test_an_invalid_host_name(monkeypatch):
    with pytest.raises(UnresolvedError, match="expected a host name"):
        resolve(Endpoint("", host="x" * 70 + ".example", port=1))


def test_an_existing_file_or_broker_is_not_replaced_by_a_socket_file(tmp_path):
    """libzmq deletes an existing file."""
    path = tmp_path / "x"
    endpoint = parse_endpoint(f"ipc://{path}", listen=True)
    assert listening_address(endpoint) == (f"ipc://{path}", False)
    path.write_text("somebody's")
    with pytest.raises(EndpointError, match="the path is a file that is not a socket"):
        listening_address(endpoint)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(EndpointError, match="address already in use"):
            listening_address(endpoint)
    assert listening_address(endpoint)  # what a broker that was killed has left behind
    with pytest.raises(EndpointError, match=r"the folder .*missing does not exist"):
        listening_address(parse_endpoint(f"ipc://{tmp_path}/missing/x", listen=True))
