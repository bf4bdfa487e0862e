"""Server addresses as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxserver.wire import SettingError, parse_server_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mx-server", "mx-server:8001"),
        ("mx-server:9", "mx-server:9"),
        ("  mx-server.ns.svc.cluster.local:8001\n", "mx-server.ns.svc.cluster.local:8001"),
        ("http://mx-server", "mx-server:8001"),
        ("http://mx-server:80/", "mx-server:80"),
        ("HTTPS://mx_server:443", "https://mx_server:443"),
        ("https://fd00::1", "https://[fd00::1]:8001"),
        ("10.0.0.1:08001", "10.0.0.1:8001"),
        ("::1", "[::1]:8001"),
        ("fd00::1", "[fd00::1]:8001"),
        ("[::1]", "[::1]:8001"),
        ("[fe80::1%eth0]:7", "[fe80::1%eth0]:7"),
        ("http://[::ffff:10.0.0.1]:7", "[::ffff:10.0.0.1]:7"),
        (
            "http://model-express-server.model-express.svc.cluster.local:8080",
            "model-express-server.model-express.svc.cluster.local:8080",
        ),
        ("https://mx:443/", "https://mx:443"),
        ("mx:9/", "mx:9"),
        ("grpc://mx:9", "mx:9"),
        ("grpc://mx/", "mx:8001"),
        ("GRPCS://mx:9/", "https://mx:9"),
        ("dns:mx:9", "mx:9"),
        ("dns:///mx:9", "mx:9"),
        ("dns:///mx", "mx:8001"),
        ("dns:9", "dns:9"),
        ("ipv4:10.0.0.1:9", "10.0.0.1:9"),
        ("ipv4:///10.0.0.1:9", "10.0.0.1:9"),
        ("ipv6:[::1]:9", "[::1]:9"),
        ("ipv6:%5B::1%5D:9", "[::1]:9"),
        ("ipv6:::1", "[::1]:8001"),
        ("passthrough:///mx:9", "mx:9"),
    ],
)
def test_accepted(text: str, expected: str) -> None:
    assert parse_server_address(text) == expected
    assert parse_server_address(expected) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no host"),
        ("  ", "no host"),
        (":8001", "no host"),
        ("http://", "no host"),
        ("a b:1", "no host"),
        ("user@host:1", "no host"),
        ("host/path", "no host"),
        ("[::1:8001", "no host"),
        ("host:", "no port"),
        ("host:0", "no port"),
        ("host:65536", "no port"),
        ("host:٣", "no port"),
        ("host:-1", "no port"),
        ("host:80/path", "no port"),
        ("tcp://10.0.0.1:8001", "scheme 'tcp'"),
        ("xds:///host:1", "scheme 'xds'"),
        ("http://host:1//", "no port"),
        ("grpc://", "no host"),
        ("dns://8.8.8.8/host:1", "name server '8.8.8.8'"),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", "several hosts"),
        ("dns:///", "no host"),
        ("unix:/run/mx.sock", "no port"),
    ],
)
def test_refused_with_the_part_and_the_rule(text: str, named: str) -> None:
    with pytest.raises(SettingError, match="must be host:port") as caught:
        parse_server_address(text)
    assert named in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["https://u:hunter2@mx:1", "grpc://u:hunter2@mx:1", "dns:///u:hunter2@mx:1"])
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SettingError, match="no user and no password") as caught:
        parse_server_address(text)
    assert "hunter2" not in str(caught.value)


@given(
    st.one_of(st.text(), st.builds(str.__add__, st.sampled_from(["dns:", "ipv6:", "ipv4:///", "grpc://"]), st.text()))
)
def test_any_text_gives_an_address_or_a_setting_error(text: str) -> None:
    try:
        address = parse_server_address(text)
    except SettingError:
        return
    host, _, port = address.rpartition(":")
    assert host
    assert 0 < int(port) < 65536
