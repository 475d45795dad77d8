"""``cryorecon reconstruct``: a map from poses that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from cryorecon.cli.command import COMPUTE, EXPERT, OUTPUT, examples
from cryorecon.cli.console import (
    count_progress,
    messages,
    prepare_folder,
    print_json,
    usable_device,
    use_threads,
)
from cryorecon.cli.options import (
    CtfFile,
    Device,
    DryRun,
    Json,
    Overwrite,
    Particles,
    PosesFile,
    Project,
    Seed,
    Threads,
    option,
    output,
)
from cryorecon.errors import CryoreconError
from cryorecon.io.files import refuse_to_replace, require_folders

_MAPS = (".mrc", ".map")
EXAMPLES = examples(
    ("a map from refined poses", "cryorecon reconstruct Refine3D/job020/run_data.star -o map.mrc"),
    (
        "with half maps and their resolution",
        "cryorecon reconstruct run_data.star -o map.mrc --half-maps",
    ),
    (
        "a stack with the pickles of cryoDRGN",
        "cryorecon reconstruct particles.mrcs --ctf-file ctf.pkl --poses poses.pkl -o map.mrc",
    ),
    (
        "into a job directory, with the markers that RELION looks for",
        "cryorecon reconstruct run_data.star -o External/job030 --half-maps --threads 4",
    ),
)


def reconstruct_command(
    particles: Particles,
    output: Annotated[Path, output("Map to write (.mrc), or a job directory.", "FILE")],
    half_maps: Annotated[
        bool,
        option(OUTPUT, "Half maps too, by rlnRandomSubset, else at random.", "--half-maps"),
    ] = False,
    wiener: Annotated[
        float,
        option(
            EXPERT, "Regularisation, as a fraction of a shell's mean weight.", metavar="X",
            hidden=True, min=0, max=1000,
        ),
    ] = 1e-3,
    padding: Annotated[
        int, option(COMPUTE, "Oversampling of the transform.", metavar="N", hidden=True, min=1)
    ] = 2,
    device: Device = "cpu",
    project: Project = None,
    seed: Seed = 0,
    threads: Threads = None,
    ctf: CtfFile = None,
    poses: PosesFile = None,
    json: Json = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Backproject particles with the poses and CTFs in their file."""
    # torch takes seconds to load: only when the command runs.
    from cryorecon.io.cryodrgn import with_poses
    from cryorecon.io.particles import read_particles
    from cryorecon.run.dry_run import describe_reconstruct
    from cryorecon.run.job import Task, open_job, write_output_nodes
    from cryorecon.run.table_doubts import table_doubts

    use_threads(threads)
    to_file = _is_file_name(output)
    told = messages(json)
    source = read_particles(particles, project, ctf=ctf)
    source = source if poses is None else with_poses(source, poses)
    doubts = table_doubts(source)
    for doubt in doubts:
        told.print(f"WARNING: {doubt}", markup=False)
    if dry_run:
        estimate = describe_reconstruct(source, told, usable_device(device), doubts)
        if json:
            print_json(estimate)
        return
    settings: dict[str, Any] = {"half_maps": half_maps, "wiener": wiener, "padding": padding}
    settings["device"] = usable_device(device)
    if to_file:
        _refuse_existing(output, half_maps, overwrite, [particles, ctf, poses, *source.stacks])
        figures = _reconstruct(source, output, settings, seed, told)
    else:
        prepare_folder(output, overwrite)
        task = Task("reconstruct", particles, len(source), settings, settings, seed)
        with open_job(output, told, task):
            figures = _reconstruct(source, output / "reconstruction.mrc", settings, seed, told)
            write_output_nodes(output, {"reconstruction.mrc": 6})
    if json:
        print_json(figures)


def _is_file_name(output: Path) -> bool:
    """Whether a map is to have this name, or a job's folder."""
    if output.suffix.lower() in _MAPS and not output.is_dir():
        return True
    if output.suffix and not output.is_dir():
        raise CryoreconError(
            f"{output} is no name for a map",
            "Let it end in .mrc, or give a folder: one that is new has no dot in its name",
        )
    return False


def _half_names(output: Path) -> list[Path]:
    return [output.with_name(f"{output.stem}_half{number}_unfil.mrc") for number in (1, 2)]


def _refuse_existing(
    output: Path, half_maps: bool, overwrite: bool, inputs: list[Path | None]
) -> None:
    outputs = [output, *(_half_names(output) if half_maps else [])]
    require_folders(outputs)
    refuse_to_replace(outputs, inputs, overwrite=overwrite)


def _reconstruct(
    source: Any, output: Path, settings: dict[str, Any], seed: int, told: Console
) -> dict[str, Any]:
    import torch

    from cryorecon.io.mrc import write_map
    from cryorecon.maps.fsc import fsc_curve
    from cryorecon.run.curves import FscCurve
    from cryorecon.run.half_sets import half_sets
    from cryorecon.run.reconstruct import reconstruct
    from cryorecon.run.repeats import repeats

    halves = settings["half_maps"]
    generator = torch.Generator().manual_seed(seed)
    half = half_sets(source, generator, repeats(source), told.print) if halves else None
    with count_progress("Backprojecting", "images") as progress:
        result = reconstruct(
            source, half=half, wiener=settings["wiener"], padding=settings["padding"],
            device=settings["device"], progress=progress,
        )  # fmt: skip
    pixel = source.pixel_size_angst
    write_map(output, result.volume.numpy(), pixel)
    told.print(f"[bold]{output}[/]  {source.box} px at {pixel:g} A")
    figures: dict[str, Any] = {
        "map": output,
        "particles": len(source),
        "box": source.box,
        "pixel_size_angst": pixel,
    }
    if result.halves is None:
        return figures
    names = _half_names(output)
    for name, volume in zip(names, result.halves, strict=True):
        write_map(name, volume.numpy(), pixel)
        told.print(str(name))
    curve = FscCurve(fsc_curve(*result.halves), source.box, pixel, "half maps")
    told.print(f"half maps, unmasked, poses as given: {curve.resolution_text(0.143)}")
    resolution = {"0.143": curve.resolution_angst(0.143)}
    return figures | {"half_maps": names, "resolution_angst": resolution}
