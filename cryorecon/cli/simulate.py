"""``cryorecon simulate``: particle stacks with known poses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cryorecon.cli.command import INPUT, MOLECULE, examples
from cryorecon.cli.console import count_progress, messages, prepare_folder, print_json, use_threads
from cryorecon.cli.options import (
    OFFSET_RANGE_HELP,
    Folder,
    Json,
    N,
    Overwrite,
    Seed,
    Snr,
    Threads,
    argument,
    option,
)
from cryorecon.io.files import refuse_to_replace
from cryorecon.run.simulate_config import SimulateConfig

_D = SimulateConfig()
EXAMPLES = examples(
    ("2,000 noisy particles of a PDB entry", "cryorecon simulate 4ake.pdb -o sim"),
    (
        "of a box of 128 px at 1.5 A, without noise",
        "cryorecon simulate model.cif -o sim -n 500 --box 128 --pixel-size 1.5 --snr inf",
    ),
    (
        "off centre, with coloured noise, of a map",
        "cryorecon simulate emd.mrc -o sim --snr 0.05 --offset-range 6 --noise coloured",
    ),
)


def simulate_command(
    model: Annotated[Path, argument("PDB or mmCIF (also .gz), or a cubic MRC map.", "MODEL")],
    output: Folder,
    n: N = _D.n_particles,
    box: Annotated[
        int | None,
        option(INPUT, "Side of the images [px].", metavar="PX", default="64, or the map's own"),
    ] = None,
    pixel_size: Annotated[
        float | None,
        option(
            INPUT,
            "Pixel size [A/px].",
            metavar="A",
            default="the molecule fills 3/4 of the box, or the map's own",
        ),
    ] = None,
    snr: Snr = _D.snr,
    defocus_min: Annotated[
        float, option(INPUT, "Smallest defocus [A].", metavar="A")
    ] = _D.defocus_min_angst,
    defocus_max: Annotated[
        float, option(INPUT, "Largest defocus [A].", metavar="A")
    ] = _D.defocus_max_angst,
    astigmatism: Annotated[
        float, option(INPUT, "Largest astigmatism [A].", metavar="A", hidden=True)
    ] = _D.astigmatism_angst,
    phase_shift: Annotated[
        float, option(INPUT, "Phase shift of a phase plate [deg].", metavar="DEG", hidden=True)
    ] = 0.0,
    offset_range: Annotated[float, option(MOLECULE, OFFSET_RANGE_HELP, metavar="A")] = 0.0,
    view_clusters: Annotated[
        int,
        option(
            MOLECULE,
            "Preferred viewing directions; 0: all views alike.",
            metavar="N",
            hidden=True,
        ),
    ] = 0,
    view_concentration: Annotated[
        float,
        option(
            MOLECULE,
            "How narrow each preferred direction is (von Mises-Fisher kappa).",
            metavar="X",
            hidden=True,
        ),
    ] = _D.view_concentration,
    noise: Annotated[
        Literal["white", "coloured"], option(INPUT, "Spectrum of the noise.")
    ] = "white",
    noise_falloff: Annotated[
        float,
        option(
            INPUT,
            "Coloured noise has power 1 / (1 + (s x this)^2) at frequency s [A].",
            metavar="A",
            hidden=True,
        ),
    ] = _D.noise_falloff_angst,
    voltage: Annotated[float, option(INPUT, "Acceleration voltage [kV].", metavar="KV")] = (
        _D.voltage_kv
    ),
    cs: Annotated[
        float, option(INPUT, "Spherical aberration [mm].", metavar="MM", hidden=True)
    ] = _D.spherical_aberration_mm,
    amplitude_contrast: Annotated[
        float, option(INPUT, "Amplitude contrast, 0 to 1.", metavar="X", hidden=True)
    ] = _D.amplitude_contrast,
    b_factor: Annotated[
        float | None,
        option(MOLECULE, "One B-factor for all atoms [A^2].", metavar="A2", default="the file's"),
    ] = None,
    keep_hydrogens: Annotated[
        bool, option(MOLECULE, "Keep hydrogens.", "--keep-hydrogens", hidden=True)
    ] = False,
    keep_waters: Annotated[
        bool, option(MOLECULE, "Keep waters.", "--keep-waters", hidden=True)
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Simulate particles of a molecule: particles.mrcs, particles.star (true poses), map.mrc.

    Of an atomic model the first model counts, the most occupied of alternative locations, no
    hydrogens and no waters unless asked for.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.simulate import simulate

    config = SimulateConfig(
        n_particles=n,
        box=box,
        pixel_size_angst=pixel_size,
        snr=snr,
        defocus_min_angst=defocus_min,
        defocus_max_angst=defocus_max,
        astigmatism_angst=astigmatism,
        phase_shift_deg=phase_shift,
        shift_angst=offset_range,
        view_clusters=view_clusters,
        view_concentration=view_concentration,
        noise=noise,
        noise_falloff_angst=noise_falloff,
        voltage_kv=voltage,
        spherical_aberration_mm=cs,
        amplitude_contrast=amplitude_contrast,
        b_factor_angst2=b_factor,
        keep_hydrogens=keep_hydrogens,
        keep_waters=keep_waters,
        seed=seed,
    )
    use_threads(threads)
    prepare_folder(output, overwrite)
    written = [output / name for name in ("particles.mrcs", "particles.star", "map.mrc")]
    refuse_to_replace(written, [model])
    with count_progress("Simulating", "images") as progress:
        simulate(model, output, config, progress)
    star, truth = output / "particles.star", output / "map.mrc"
    told = messages(json)
    told.print(f"[bold]{star}[/]  {n} particles")
    told.print(f"{truth}  the true map")
    if json:
        from cryorecon.io.mrc import read_header

        header = read_header(truth)
        figures = {"particles": n, "box": header.shape[0], "star": star, "map": truth}
        print_json(figures | {"pixel_size_angst": header.pixel_size_angst})
