"""Names of metrics that NVIDIA's package has too: ours by such a name mean the same there.

THEIRS is what a scrape of the client of modelexpress 0.7.0 listed (`enable_metrics`, MX_METRICS_ENABLED=1): each family
with its kind and labels. Dashboards and alerts that were made for it keep what they ask of the shared ones.
"""

from __future__ import annotations

import pytest

from mxcore.metrics import EXPORTED, FAMILIES
from mxserver.telemetry import DEFINITIONS, MODEL_DEFINITIONS

THEIRS = {
    "mx_artifact_install_bytes_total": ("counter", {"artifact", "archive", "scheme"}),
    "mx_artifact_install_step_seconds": ("histogram", {"artifact", "archive", "step", "scheme"}),
    "mx_build_info": ("gauge", {"component", "version", "scheme"}),
    "mx_load_phase_seconds": ("histogram", {"engine", "model", "phase", "scheme"}),
    "mx_load_seconds": ("histogram", {"engine", "model", "model_role", "scheme", "outcome"}),
    "mx_nixl_data_plane_errors_total": ("counter", {"scheme", "kind"}),
    "mx_nixl_receive_total": ("counter", {"scheme", "result"}),
    "mx_p2p_candidates": ("histogram", {"policy", "scheme", "stage"}),
    "mx_p2p_list_sources_total": ("counter", {"policy", "scheme", "result"}),
    "mx_p2p_metadata_lookup_failures_total": ("counter", {"policy", "scheme"}),
    "mx_p2p_source_attempt_phase_seconds": ("histogram", {"policy", "phase", "outcome", "scheme"}),
    "mx_p2p_source_attempts_total": ("counter", {"policy", "scheme", "result"}),
    "mx_p2p_source_load": ("gauge", {"scheme"}),
    "mx_p2p_source_selection_seconds": ("histogram", {"policy", "scheme"}),
    "mx_p2p_source_selections_total": ("counter", {"policy", "scheme"}),
    "mx_p2p_transfer_seconds": ("histogram", {"policy", "scheme", "outcome"}),
}
SHARED = {"mx_load_seconds": {"outcome"}, "mx_load_phase_seconds": {"phase"}}
OUTCOMES = {"success", "error"}  # theirs
LOAD_BUCKETS = {0.5, 1.0, 2.5, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0}


def test_none_but_those_that_mean_the_same_have_a_name_of_theirs() -> None:
    ours = {family.name for family in (*FAMILIES, *EXPORTED, *DEFINITIONS, *MODEL_DEFINITIONS)}
    assert ours & THEIRS.keys() == SHARED.keys()
    others = {name for name in ours - SHARED.keys() if not name.startswith(("mxworker_", "mxserver_"))}
    assert others == set(), "the beginning mx_ is theirs"


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_one_is_asked_for_in_the_same_way(name: str) -> None:
    [family] = [one for one in FAMILIES if one.name == name]
    kind, labels = THEIRS[name]
    assert family.kind == kind
    assert labels & set(family.labels) == SHARED[name]
    assert set(family.buckets) >= LOAD_BUCKETS, "else sums over both packages' workers are wrong"
    if "outcome" in family.labels:
        assert set(family.values[family.labels.index("outcome")]) == OUTCOMES
