"""What the benches of transfers are made of: flips that are caught, figures by their names, faults that are chosen."""

from __future__ import annotations

import random

import pytest

from mxbench.chaos.command import choose
from mxbench.chaos.faults import CUTS, FAULTS
from mxbench.chaos.flips import CHUNKS, flip_bytes
from mxbench.chaos.soak import Course, soak
from mxbench.chaos.tally import STALLED, Tally
from mxbench.fleet import fanout, total_bytes
from mxbench.hostile.liars import receive_from_liars
from mxbench.hostile.strangers import strangers_beside
from mxbench.transfer import limits, registration
from mxbench.transfer.command import TRANSPORTS, Rates, figures_of
from mxbench.transfer.shapes import MANY, MIX, SHAPES, scaled


@pytest.mark.parametrize("seed", [1, 2])
def test_every_flipped_byte_is_caught(seed: int) -> None:
    count = 2 * CHUNKS + 100  # at the source, on arrival, and a round that is not full
    flips = flip_bytes(count, seed)
    assert (flips.made, flips.caught, flips.false_alarms) == (count, count, 0)


def test_the_figures_of_a_transfer_bench() -> None:
    rates = {
        (transport, shape): Rates(
            moving=[9.0, 2.0, 1.0],
            whole=[1.0],
            unverified=[1.26, 2.1, 99.0],
            one_descriptor=[1.5, 2.5, 9.0],
            one_verified=[2.0, 1.6, 8.0],
            limit=[4.0, 4.0, 7.0],
        )
        for transport in TRANSPORTS
        for shape in SHAPES
    }
    rates["tcp", "many"].moving = [1.0] * 3
    rates["same-host", "many_apart"].unverified = [0.5] * 3
    rates["same-host", "few"].limit = [8.0]
    machine = {
        "registration_ratio": 20.0,
        "idle_agent_core_share": 0.004,
        "tls_vs_plain": 0.4,
        "tls_vs_plain_by_cpu": 0.3,
    }
    linked = {
        "tcp": Rates(moving=[9.0, 10.0, 11.0], unverified=[10.2, 10.1, 99.0]),
        "same-host": Rates(moving=[10.0], unverified=[10.1]),
    }
    figures = figures_of(rates, linked, machine)
    assert figures["many_vs_one_descriptor"] == pytest.approx(0.84)
    assert figures["many_apart_vs_one_descriptor_same_host"] == 0.2
    assert figures["many_vs_one_descriptor_ours_verified"] == 0.4  # the worse transport, against the limit's median
    assert figures["many_vs_one_descriptor_both_verified"] == 0.5
    assert figures["few_vs_one_descriptor_both_verified_tcp"] == 1.25
    assert figures["registration_vs_one_by_one"] == 20.0
    assert figures["verify_overhead_ratio"] == pytest.approx(0.02)  # the worse one
    assert figures["verify_overhead_ratio_cores_busy_tcp"] == pytest.approx(0.05)
    assert figures["verify_overhead_ratio_cores_busy_same_host"] == pytest.approx(0.05)
    assert figures["tcp_vs_raw_socket"] == 0.5
    assert figures["same_host_vs_memcpy"] == 0.25
    assert figures["idle_agent_core_share"] == 0.004
    assert (figures["tls_vs_plain"], figures["tls_vs_plain_by_cpu"]) == (0.4, 0.3)


def test_the_figures_of_chaos() -> None:
    tally = Tally(runs=3, bytes_again=[0.0, 0.03], notice_seconds=[0.1, 4.2], by_fault={STALLED: 2, "kill a source": 1})
    figures = tally.figures()
    assert {"runs", "unfinished", "engines_lost", "wrong_weights", "resent_ratio", "max_notice_seconds"} <= set(figures)
    assert (figures["resent_ratio"], figures["max_notice_seconds"]) == (0.015, 4.2)
    assert figures["kills_of_a_target_with_a_stalled_source"] == 2
    assert Tally().figures()["max_notice_seconds"] == 0.0


def test_a_liar_among_three_is_not_believed() -> None:
    lied = receive_from_liars(3, seed=1, shares={"tcp": 1.0})
    assert (lied.receives, lied.wrong, lied.by_peers) == (3, 0, 3)


def test_strangers_make_a_worker_hold_little() -> None:
    beset = strangers_beside(1.0, seed=1)
    assert beset.calls > 0 == beset.wrong
    assert beset.growth_mib < 200  # `mx bench chaos` has the goal; each of these messages was held before, whole


def test_fifty_transfers_leave_no_thread_and_no_descriptor() -> None:
    figures = soak(50, seed=1, ways={"sockets": ("tcp", False, 1.0)}).figures()
    assert figures["soak_transfers"] == 50
    assert (figures["soak_wrong"], figures["soak_refused"]) == (0, 0)
    assert (figures["soak_threads_more"], figures["soak_descriptors_more"]) == (0, 0)
    assert figures["soak_rss_growth_mib"] < 4


def test_a_leak_is_seen_and_a_thread_about_to_end_is_none() -> None:
    course = Course(
        [80.0, 90.0, *(100.0 + i for i in range(8))], [3, 3, 3, 3, 5, 3, 3, 3, 5, 3], [4, 4, 4, 4, 5, 5, 6, 7, 8, 9]
    )
    assert course.grown() == {"rss_mib": 5.0, "rss_noise_mib": 0.0, "threads": 0, "descriptors": 2}


def test_which_faults_are_chosen() -> None:
    chance = random.Random(3)
    chosen = [choose(chance, "network", ()) for _ in range(600)]
    assert set(chosen) == {*FAULTS, *CUTS}
    assert chosen.count(STALLED) > 200
    assert not {choose(chance, "tcp", ()) for _ in range(300)} & set(CUTS)
    assert {choose(chance, "network", ("cut off a source",)) for _ in range(9)} == {"cut off a source"}


def test_the_shapes_are_what_they_are_called() -> None:
    assert sum(count for count, _ in MANY) == 20_000
    assert total_bytes(MANY) == 20_000 * 50 * 1024
    assert total_bytes(MIX) == 988_065_536  # Qwen2.5-0.5B in bfloat16
    assert total_bytes(scaled(MANY, 0.1)) == 20_000 * 5 * 1024


def test_registering_by_region_makes_little_metadata() -> None:
    found = registration.measure(200, 4096)
    assert found.merged_metadata_bytes < 1000 < found.single_metadata_bytes
    assert found.merged_seconds > 0 < found.single_seconds


def test_the_figures_of_a_fan_out() -> None:
    mib = 1 << 20
    single = fanout.Round(10.0, [mib, 0])
    swarm = fanout.Round(11.5, [2 * mib, mib // 2, mib], bytes_again=mib // 4, seed_cpu_seconds=0.5, server_calls=40)
    assert fanout.figures_of("star", 8, swarm, single, mib) == {"star_t8_over_t1": 1.15}
    assert fanout.figures_of("swarm", 32, swarm, single, mib) == {
        "t32_over_t1": 1.15,
        "seed_sent_over_model_32": 2.0,
        "most_sent_by_a_receiver_over_model_32": 1.0,
        "bytes_again_over_model_32": 0.25,
        "seed_cpu_seconds_32": 0.5,
        "server_calls_32": 40,
    }
    assert [fanout.shaped(count, 80.0) for count in (1, 8, 32)] == [80.0, 80.0, 20.0]


def test_memory_is_read_and_hashed_by_all_cores() -> None:
    read, hashed = limits.all_cores(1 << 20)
    assert len(read) == len(hashed) > 1
    assert min(*read, *hashed) > 0
