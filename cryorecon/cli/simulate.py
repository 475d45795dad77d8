"""``cryorecon simulate``: particle stacks with known poses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.console import console, count_progress, prepare_folder
from cryorecon.run.simulate import SimulateConfig, simulate

_D = SimulateConfig()


def simulate_command(
    model: Annotated[Path, typer.Argument(help="PDB or mmCIF (also .gz), or a cubic MRC map.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")],
    n: Annotated[int, typer.Option("--n", help="Particles.")] = _D.n_particles,
    box: Annotated[int, typer.Option(help="Box side in pixels.")] = _D.box,
    pixel_size: Annotated[
        float | None, typer.Option(help="A/px; default: the model fills 3/4 of the box.")
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
    noise_falloff: Annotated[
        float, typer.Option(help="0: white noise. Else power 1/(1+(s x this)^2), A.")
    ] = 0.0,
    voltage: Annotated[float, typer.Option(help="kV.")] = _D.voltage_kv,
    cs: Annotated[float, typer.Option(help="mm.")] = _D.spherical_aberration_mm,
    amplitude_contrast: Annotated[float, typer.Option()] = _D.amplitude_contrast,
    b_factor: Annotated[
        float | None, typer.Option(help="One B-factor for all atoms, A^2; negative: the file's.")
    ] = _D.b_factor_angst2,
    keep_hydrogens: Annotated[bool, typer.Option("--keep-hydrogens")] = False,
    keep_waters: Annotated[bool, typer.Option("--keep-waters")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Simulate particles of a molecule: particles.mrcs, particles.star (true poses), map.mrc.

    Of an atomic model the first model counts, the most occupied of alternative locations, no
    hydrogens and no waters unless asked for.
    """
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
        noise_falloff_angst=noise_falloff,
        voltage_kv=voltage,
        spherical_aberration_mm=cs,
        amplitude_contrast=amplitude_contrast,
        b_factor_angst2=None if b_factor is None or b_factor < 0 else b_factor,
        keep_hydrogens=keep_hydrogens,
        keep_waters=keep_waters,
        seed=seed,
    )
    prepare_folder(output, overwrite)
    with count_progress("Simulating", "images") as progress:
        simulate(model, output, config, progress)
    console.print(f"[bold]{output / 'particles.star'}[/]  {n} particles, {box} px")
    console.print(f"{output / 'map.mrc'}  the true map")
