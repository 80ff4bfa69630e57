"""Where a cluster listens and how often it asks: from arguments, or from its file."""

from __future__ import annotations

import socket

import pytest

from dask_pcm.errors import PoolError
from dask_pcm.pools.settings import ClusterSettings


@pytest.fixture
def file(tmp_path):
    def write(section):
        path = tmp_path / "cluster.yaml"
        path.write_text(f"pools: {{cpu: {{batch: local}}}}\ncluster: {section}\n")
        return path

    return write


def test_a_file_has_settings_and_arguments_precede_it(file):
    path = file("{port: '9100:9101', poll_interval: 2m, interface: ib0}")
    found = ClusterSettings(interface="eth0").over_file(path)
    assert found == ClusterSettings(interface="eth0", port="9100:9101", poll_interval="2m")
    assert found.poll_s == 120.0
    assert ClusterSettings().over_file({"cpu": {"batch": "local"}}) == ClusterSettings()
    assert ClusterSettings().over_file(file("null")) == ClusterSettings()


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("{prot: 1}", "unknown key 'prot'. Did you mean 'port'"),
        ("3", "The section cluster is 3"),
        ("{port: 9100-9101}", "port is '9100-9101'; expected a port, 'first:last'"),
        ("{port: '9101:9100'}", "expected a port"),
        ("{port: true}", "expected a port"),
        ("{poll_interval: often}", "poll_interval is 'often'; expected a time"),
        ("{poll_interval: 0}", "poll_interval is 0; expected a time"),
        ("{interface: 3}", "interface is 3; expected a text"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(file, section, text):
    with pytest.raises(PoolError) as raised:
        ClusterSettings().over_file(file(section))
    assert text in str(raised.value)


def test_the_first_free_port_of_a_range_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        if port > 65_533:
            pytest.skip("no port above")
        assert ClusterSettings(port=f"{port}:{port + 2}").free_port() in (port + 1, port + 2)
        assert ClusterSettings(port=0).free_port() == 0
        assert ClusterSettings(port=port).free_port() == port  # Dask says that it is taken
        said = f"None of the ports {port} to {port + 1} is free"
        with socket.create_server(("", port + 1)), pytest.raises(PoolError, match=said):
            ClusterSettings(port=f"{port}:{port + 1}").free_port()
