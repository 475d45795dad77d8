"""``cryorecon simulate``: particle stacks with known poses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorecon.cli.console import console, count_progress, prepare_folder
from cryorecon.run.simulate_config import SimulateConfig

_D = SimulateConfig()


def simulate_command(
    model: Annotated[Path, typer.Argument(help="PDB or mmCIF (also .gz), or a cubic MRC map.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")],
    n: Annotated[int, typer.Option("--n", help="Particles.")] = _D.n_particles,
    box: Annotated[
        int | None, typer.Option(help="Box side in pixels; default 64, or the map's own.")
    ] = None,
    pixel_size: Annotated[
        float | None,
        typer.Option(help="A/px; default: the model fills 3/4 of the box, or the map's own."),
    ] = None,
    snr: Annotated[
        float, typer.Option(help="Variance of CTF-modulated signal over that of noise; inf: none.")
    ] = _D.snr,
    defocus_min: Annotated[float, typer.Option(help="A.")] = _D.defocus_min_angst,
    defocus_max: Annotated[float, typer.Option(help="A.")] = _D.defocus_max_angst,
    astigmatism: Annotated[float, typer.Option(help="Largest, A.")] = _D.astigmatism_angst,
    phase_shift: Annotated[float, typer.Option(help="Degrees.")] = 0.0,
    shift: Annotated[float, typer.Option(help="Origins uniform within +- this, A.")] = 0.0,
    view_clusters: Annotated[int, typer.Option(help="0: uniform viewing directions.")] = 0,
    view_concentration: Annotated[
        float, typer.Option(help="von Mises-Fisher kappa of each cluster.")
    ] = _D.view_concentration,
    noise: Annotated[Literal["white", "coloured"], typer.Option(help="Noise spectrum.")] = "white",
    noise_falloff: Annotated[
        float, typer.Option(help="Power of coloured noise is 1/(1+(s x this)^2), A.")
    ] = _D.noise_falloff_angst,
    voltage: Annotated[float, typer.Option(help="kV.")] = _D.voltage_kv,
    cs: Annotated[float, typer.Option(help="mm.")] = _D.spherical_aberration_mm,
    amplitude_contrast: Annotated[float, typer.Option()] = _D.amplitude_contrast,
    b_factor: Annotated[
        float | None, typer.Option(help="One B-factor for all atoms, A^2; default: the file's.")
    ] = None,
    keep_hydrogens: Annotated[bool, typer.Option("--keep-hydrogens")] = False,
    keep_waters: Annotated[bool, typer.Option("--keep-waters")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
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
        shift_angst=shift,
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
    prepare_folder(output, overwrite)
    with count_progress("Simulating", "images") as progress:
        simulate(model, output, config, progress)
    console.print(f"[bold]{output / 'particles.star'}[/]  {n} particles")
    console.print(f"{output / 'map.mrc'}  the true map")
