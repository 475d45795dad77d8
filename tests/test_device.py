"""Whole jobs on a device that is only pretended: no tensor of the CPU meets one of the device."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import cryorecon, simulated
from pretended_device import DEVICE, OnDevice, pretended_device
from rich.console import Console

from cryorecon.engines import rounds, stream
from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.half_maps import insert
from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.rivals import Rivals
from cryorecon.engines.rmfn import RmfnConfig, Search
from cryorecon.engines.shrinking import ShrinkingBatch, at_once
from cryorecon.errors import CryoreconError
from cryorecon.io import read_ahead
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.physics.fourier import half_plane
from cryorecon.physics.masks import Support
from cryorecon.physics.rotations import exp_map, random_rotations
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.ranks import Ranks
from cryorecon.run import abinitio as abinitio_module
from cryorecon.run import device, dry_run, independent_halves, load
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.checkpoint import on_cpu
from cryorecon.run.load import load_observations
from cryorecon.run.moments import reconstruct as moment_reconstruct
from cryorecon.run.moments.estimate import MomentsOptions
from cryorecon.run.moments.reconstruct import MomentReconstructOptions, abinitio_moments
from cryorecon.run.reconstruct import reconstruct

QUIET = Console(quiet=True)
TINY = RmfnConfig(
    n_starts=1,
    temperatures=(5.0, 1.0),
    search_nside=1,
    search_images=30,
    half_rounds=2,
    joint_rounds=1,
    final_steps=2,
    width=16,
    update_scale=True,
)
SHORT = AmortizedConfig(images_seen=192, search_nside=1, half_rounds=2, joint_rounds=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """60 particles, 20 px at 3.84 A, SNR 2."""
    return simulated(tmp_path_factory.mktemp("few"), 60, 20, 2.0) / "particles.star"


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    with pretended_device() as waits:
        there, here = torch.arange(6.0, device=DEVICE), torch.arange(6.0)
        assert isinstance(there, OnDevice)
        assert (there * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7, 9, 11]
        assert (there.to("cpu") + here).tolist() == [0, 2, 4, 6, 8, 10]
        for mix in (
            lambda: there + here,
            lambda: here + there.sum(),
            lambda: there[torch.tensor([1])],
            lambda: torch.cat([there, here]),
            lambda: there.index_add_(0, torch.tensor([1]), there[:1]),
        ):
            with pytest.raises(RuntimeError, match="of the CPU among"):
                mix()
        with pytest.raises(RuntimeError, match="whole numbers"):
            there.long()[None] @ there.long()[:, None]
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        weight = torch.nn.Linear(6, 1).to(DEVICE)
        weight(there).sum().backward()
        assert isinstance(weight.weight.grad, OnDevice)
    assert not waits  # of the program; these lines are of a test


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Reports are drawn on the CPU, from files."""
    for module in (abinitio_module, moment_reconstruct):
        monkeypatch.setattr(module, "report_at_end", lambda *_: None)


def job(star, folder, **options):
    with pretended_device() as waits:
        abinitio(star, folder, AbinitioOptions(device="meta", **options), QUIET)
    return waits


# What each image, step or batch goes through: not to wait for a device there.
LOOPS = ("engines/accumulate", "engines/refine", "engines/pose_reader", "physics/fourier")
LOOPS += ("physics/projection", "physics/rotations", "networks/")


def in_loops(waits):
    """Lines that wait in inner loops, but for the one that tells which images still move.

    It is waited for once a step of thousands of images, and halves the number of steps. Planes and
    grids of rotations are taken to the device once.
    """
    found = [line for line in waits if line.startswith(LOOPS)]
    once = r"engines/refine.py:\d+ step|physics/(fourier.py:\d+ to|rotations.py:\d+ so3_grid_on)"
    return [line for line in found if not re.fullmatch(once, line)]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("keep", ["auto", "disk"])
def test_engine_rmfn_runs_on_a_device(few, tmp_path, keep, monkeypatch):
    """To the map of the CPU, and without waiting for the device in inner loops.

    Images are held by the device, or read again and again.
    """
    monkeypatch.setattr(load, "free_memory", lambda _: 1e9)
    waits = job(few, tmp_path / "there", engine=TINY, keep=keep)
    abinitio(few, tmp_path / "here", AbinitioOptions(engine=TINY), QUIET)
    there, here = (read_map(tmp_path / f / "initial_model.mrc").data for f in ("there", "here"))
    assert np.corrcoef(there.ravel(), here.ravel())[0, 1] > 0.9999
    assert waits
    assert not in_loops(waits)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize(
    "options",
    [
        {"halves": "independent", "engine": replace(TINY, volume="grid")},
        {"symmetry": "C2", "subset": 40, "engine": TINY},
        {"engine": SHORT},
    ],
    ids=["halves", "symmetry", "amortized"],
)
def test_the_other_ways_run_on_a_device(few, tmp_path, options, monkeypatch):
    fewer = partial(independent_halves.chance_fsc, n_trials=1)
    monkeypatch.setattr(independent_halves, "chance_fsc", fewer)
    waits = job(few, tmp_path / "there", **options)
    assert (tmp_path / "there" / "initial_model.mrc").exists()
    assert not in_loops(waits)


def close(there, here):
    there = there.to("cpu")
    return torch.allclose(there, here, atol=1e-5 * float(here.abs().max()))


@pytest.mark.parametrize("held", ["nowhere", "on the CPU", "on the device"])
def test_images_are_transformed_and_held_on_a_device(few, monkeypatch, held):
    """As on the CPU, in whatever order, and some of them held by another process."""
    particles, rows = read_particles(few), torch.randperm(60)[:50]
    here = load_observations(particles, 0.8)
    room = {"on the device": 1e9}.get(held, 0.0)
    monkeypatch.setattr(load, "free_memory", lambda _: room)
    keep = "disk" if held == "nowhere" else "memory"
    with pretended_device() as waits:
        there = load_observations(particles, 0.8, keep=keep, device=DEVICE)
        if held != "nowhere":
            whole = there.source
            assert isinstance(whole.coefficients, OnDevice) == (held == "on the device")
            part = slice(10, 40)
            source = replace(
                whole, coefficients=whole.coefficients[part], gain=whole.gain[part], first=10
            )
            there = replace(there, source=source)
        waits.clear()
        for band in (4.0, None):
            seen = there.select(rows, band)
            known = here.select(rows, band)
            assert isinstance(seen.coefficients, OnDevice)
            assert close(seen.coefficients, known.coefficients)
            assert close(seen.ctf, known.ctf)
        assert isinstance(there.noise_power, OnDevice)
        assert close(there.noise_power, here.noise_power)
    if held == "nowhere":
        assert not [line for line in waits if "load.py" in line or "ctf.py" in line]


def test_a_dry_run_tells_who_holds_the_images(monkeypatch):
    told: list[str] = []
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    monkeypatch.setattr(load, "free_memory", lambda _: 1e9)
    assert dry_run._tell_images(1000, 64, "auto", gpu, told.append) == (0, "cuda:1")
    assert "held in the memory of cuda:1, 0.02 GB" in told[-1]
    # A quarter of a gigabyte is not enough for these.
    for device_, keep in ((gpu, "memory"), (cpu, "memory")):
        taken, place = dry_run._tell_images(20_000, 64, keep, device_, told.append)
        assert taken > 0.25e9
        assert place == "memory"
        assert "held in memory" in told[-1]
    assert dry_run._tell_images(1000, 64, "disk", gpu, told.append) == (0, "disk")
    assert "read again when needed" in told[-1]


def test_blocks_of_a_training_are_kept_on_a_device(few, monkeypatch):
    monkeypatch.setattr(stream, "block_size", lambda _: 8)
    monkeypatch.setattr(stream, "_TOGETHER", 16)
    particles, rows = read_particles(few), torch.randperm(60)
    here = load_observations(particles, 0.8).select(rows)
    with pretended_device():
        images = load_observations(particles, 0.8, keep="disk", device=DEVICE)
        there = stream.read_ahead(images).select(rows)
        assert isinstance(there.coefficients, OnDevice)
        assert close(there.coefficients, here.coefficients)
        assert close(there.ctf, here.ctf)


def test_a_start_on_a_grid_goes_on_from_its_state_on_a_device(few):
    config = replace(TINY, volume="grid", diameter=0.8)
    with pretended_device():
        images = load_observations(read_particles(few), 0.8, device=DEVICE)
        seen = images.whole(config.search_band(20))
        run = Search(config, seen, torch.Generator().manual_seed(0))
        run.step(run.batches()[0], 1.0)
        run.end_epoch()
        again = Search(config, seen, torch.Generator().manual_seed(1))
        again.load(on_cpu(run.state()))
        again.step(again.batches()[0], 1.0)


def test_a_mix_in_the_midst_of_a_job_is_caught(few, tmp_path, monkeypatch):
    """The map's support, made on the CPU, as in a job that forgets to say where."""
    on = Support.on
    monkeypatch.setattr(Support, "on", lambda self, box, dtype=None, device=None: on(self, box))
    with pytest.raises(RuntimeError, match=r"aten\.index.*of the CPU among those of the device"):
        job(few, tmp_path / "there", engine=TINY)


def test_a_map_of_known_poses_is_made_on_a_device(few):
    particles = read_particles(few)
    half = torch.arange(len(particles)) % 2
    here = reconstruct(particles, half=half)
    with pretended_device():
        there = reconstruct(particles, half=half, device=DEVICE)
    assert not isinstance(there.volume, OnDevice)
    assert torch.allclose(there.volume, here.volume, atol=1e-5 * float(here.volume.abs().max()))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize("form", ["steerable", "full"])
def test_moments_are_averaged_and_fitted_on_a_device(few, tmp_path, form):
    wanted = MomentsOptions(form=form, max_radius=4, device="meta")
    engine = MomentFitConfig(
        starts=2, iterations=4, settling=2, first_iterations=2, radius=3, beads=8
    )
    options = MomentReconstructOptions(engine, allow_ambiguous=True, device="meta")
    with pretended_device():
        abinitio_moments(few, tmp_path / "there", wanted, options, QUIET)
    assert (tmp_path / "there" / "initial_model.mrc").exists()


def test_rotations_off_the_cpu_are_those_of_the_matrix_exponential(generator):
    """And their derivatives, also at zero."""
    vectors = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    vectors[0], vectors[1] = 0, 1e-9 * vectors[1]

    def slopes(at):
        at = at.clone().requires_grad_()
        rotations = exp_map(at)
        (rotations * torch.arange(9.0, device=at.device).view(3, 3)).sum().backward()
        return rotations.detach().cpu(), at.grad.cpu()

    here = slopes(vectors)
    with pretended_device():
        there = slopes(vectors.to(DEVICE))
    for one, other in zip(here, there, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_processes_that_share_a_gpu_are_refused(monkeypatch):
    """At once, and by their number; where each has its own they go on."""
    told: list[str] = []
    precisions: list[str] = []
    numbers = torch.ones(1)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: numbers)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device, "_identity", lambda name: f"GPU of {name}")

    class Two(Ranks):
        others = 0

        def everyones(self, mine, counts):
            assert counts == [1, 1]
            return torch.cat([mine + self.others, mine])

    with pytest.raises(CryoreconError, match="2 processes have 1 GPU between them") as error:
        device.own_device("cuda", Two(1, 2))
    assert "--nproc-per-node" in error.value.remedy
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Two, "others", 1)
    assert device.own_device("cuda", Two(1, 2)) == "cuda:1"
    assert told == ["cuda:0", "cuda:1"]
    assert set(precisions) == {"highest"}
    assert not torch.backends.cudnn.allow_tf32
    assert device.own_device("cpu", Two(1, 2)) == "cpu"


def test_batches_of_a_gpu_are_read_ahead(monkeypatch):
    """Two halves of a round's batch are no more than what is read before it is asked for."""
    monkeypatch.setattr(rounds, "at_once", lambda on_cpu, bytes_each, device, most: most)
    for box in (64, 128, 256, 500):
        plane = half_plane(box)
        none = torch.zeros(0)
        images = ImageSet(plane, list, torch.zeros(1, plane.n_shells), none, none, none)
        batch = rounds.image_batches(images).size
        larger = rounds.image_batches(replace(images, stored_box=2 * box)).size
        assert 2 * larger * 4 * (2 * box) ** 2 <= read_ahead._LARGEST
        assert 2 * batch * 4 * box**2 <= read_ahead._LARGEST
        assert 8 * len(plane) * batch <= 2**30
        few = plane.within(6.0)
        # Libraries of a GPU take no more than 65,535 small matrices at once.
        assert 8 * batch <= rounds.poses_at_once(few, DEVICE) < 2**16


def test_batches_take_a_share_of_a_gpus_free_memory(monkeypatch):
    """What torch holds in reserve counts as free; any other device works as the CPU does."""
    amounts = {"memory_reserved": 3e9, "memory_allocated": 1e9, "mem_get_info": (6e9, 16e9)}
    for name, amount in amounts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, amount=amount: amount)
    gpu = torch.device("cuda:0")
    assert at_once(250, 1e6, gpu) == 2000
    assert at_once(250, 1e3, gpu) == 4096
    assert at_once(250, 1e12, gpu) == 1
    assert at_once(250, 1e6, torch.device("cpu")) == at_once(250, 1e6, DEVICE) == 250


class TinyMemory:
    """Work on spans that fails above a size, as on a full GPU."""

    def __init__(self, most):
        self.most, self.done = most, []

    def __call__(self, span):
        if span.stop - span.start > self.most:
            raise torch.OutOfMemoryError("full")
        self.done += range(span.start, span.stop)
        return span.stop - span.start


def test_spans_shrink_and_go_on_where_memory_ended():
    told, work = [], TinyMemory(3)
    parts = ShrinkingBatch(16, told.append)
    assert sum(n for _, n in parts.over(37, work)) == 37
    assert work.done == list(range(37))
    assert parts.size == 2
    assert len(told) == 3
    with pytest.raises(torch.OutOfMemoryError):
        list(ShrinkingBatch(16).over(5, TinyMemory(0)))


@pytest.mark.parametrize(
    "words", ["cuFFT error: CUFFT_ALLOC_FAILED", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"]
)
def test_spans_shrink_where_a_librarys_memory_ended(words):
    def work(span):
        if span.stop - span.start > 2:
            raise RuntimeError(words)
        return span.stop - span.start

    assert sum(n for _, n in ShrinkingBatch(8).over(11, work)) == 11
    assert sum(ShrinkingBatch(8)(torch.arange(11), lambda rows: work(slice(0, len(rows))))) == 11
    with pytest.raises(RuntimeError, match="another"):
        list(ShrinkingBatch(8).over(11, lambda _: (_ for _ in ()).throw(RuntimeError("another"))))


def test_a_round_on_a_full_device_is_the_same_round(few, tmp_path, monkeypatch):
    """Insertions that do not fit at once are repeated in parts, nothing twice."""
    sums = [NormalEquations.empty(6.0, 2, torch.float64, "cpu") for _ in range(2)]
    images = load_observations(read_particles(few), 0.8).select(torch.arange(20), 6.0)
    images = replace(images, coefficients=images.coefficients.to(torch.complex128))
    images = replace(images, ctf=images.ctf.double(), noise_power=images.noise_power.double())
    turns = random_rotations(20, torch.Generator().manual_seed(0))
    poses = turns, torch.zeros(20, 2, dtype=torch.float64)
    group, rivals = symmetry_group("C2"), Rivals.none(20)
    rivals.rotations[:, 0], rivals.share[::2, 0] = turns.flip(0), 0.25
    doubt = rivals.of(torch.arange(20), torch.device("cpu"))
    insert(sums[0], images, poses, doubt, group)
    add = NormalEquations.add

    def full(self, signal, *rest):
        if len(signal) > 7:
            raise torch.OutOfMemoryError("full")
        add(self, signal, *rest)

    monkeypatch.setattr(NormalEquations, "add", full)
    insert(sums[1], images, poses, doubt, group)
    assert torch.allclose(sums[0].signal, sums[1].signal)
    assert torch.allclose(sums[0].weight, sums[1].weight)


def test_a_device_that_computes_nothing_is_refused():
    """As a GPU that torch was not built for: it gives memory, but runs no kernel."""
    with pytest.raises(CryoreconError, match="--device meta cannot be used"):
        device.usable_device("meta")
    with pretended_device():
        assert device.usable_device("meta") == "meta"


@pytest.mark.parametrize("processes", [1, 2])
def test_auto_takes_no_gpu_that_computes_nothing(monkeypatch, processes):
    """Several processes would not know of each other which of them computes where."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if processes == 1:
        assert device.usable_device("auto") == "cpu"
    else:
        with pytest.raises(CryoreconError, match="--device cuda cannot be used"):
            device.usable_device("auto")


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(few, tmp_path):
    for command in ("abinitio-rmfn", "abinitio", "reconstruct"):
        done = cryorecon(command, few, "-o", tmp_path / command, "--device", "cuda:7")
        assert done.returncode == 1
        assert "--device cuda:7 cannot be used" in done.stderr
        assert "Give --device cpu, or use a machine with a GPU" in done.stderr
        assert not (tmp_path / command).exists()
    done = cryorecon("abinitio-rmfn", few, "-o", tmp_path / "j", "--device", "auto", "--dry-run")
    assert done.returncode == 0
