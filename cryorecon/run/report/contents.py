"""What a report says of a job, whatever it is drawn on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryorecon.engines.rivals import SURE
from cryorecon.errors import CryoreconError
from cryorecon.run.plots import view_density
from cryorecon.run.report.doubts import AT_LIMIT, Finding, findings, said_in_log
from cryorecon.run.report.inputs import ReportInputs
from cryorecon.run.report.particles import Examples, example_particles
from cryorecon.run.report.pictures import Picture, map_pictures, sphere_picture


@dataclass(frozen=True)
class Report:
    """Everything that both files show, worked out once when it is first asked for."""

    inputs: ReportInputs

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.inputs.folder.resolve().name}: {self.inputs.map_name}"

    @cached_property
    def findings(self) -> list[Finding]:
        """All checks."""
        return findings(self.inputs)

    @cached_property
    def logged(self) -> list[str]:
        """Warnings of the run itself, less what a check says as well."""
        said = said_in_log(self.inputs.log)
        limited = any(f.name == "Offsets at the limit" and f.fires for f in self.findings)
        return [line for line in said if not (limited and AT_LIMIT in line)]

    @cached_property
    def _examples(self) -> tuple[Examples | None, str]:
        try:
            return example_particles(self.inputs), self.inputs.no_particles
        except CryoreconError as error:
            return None, str(error)

    @property
    def examples(self) -> Examples | None:
        """A few particles, where the images can be read."""
        return self._examples[0]

    @property
    def no_examples(self) -> str:
        """Why there are none."""
        return f"No images to show: {self._examples[1] or 'there is no map'}"

    @cached_property
    def density(self) -> NDArray[np.floating] | None:
        """Of viewing directions over uniform, in HEALPix cells."""
        if self.inputs.poses is not None:
            return view_density(self.inputs.poses.rotations)
        if self.inputs.view_density is not None:
            return self.inputs.view_density["cryoreconViewDensity"].to_numpy(np.float64)
        return None

    @cached_property
    def pictures(self) -> list[Picture]:
        """Of the map."""
        return [] if self.inputs.map is None else map_pictures(self.inputs.map.data)

    @cached_property
    def sphere(self) -> tuple[NDArray[np.uint8], float] | None:
        """Picture of the viewing directions, and the density of its highest colour."""
        return None if self.density is None else sphere_picture(self.density)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The headline figures."""
        inputs, facts = self.inputs, []
        if inputs.fsc is not None:
            what = "Half maps" if inputs.poses is not None else "Starts"
            threshold = 0.143 if inputs.poses is not None else 0.5
            facts.append((f"{what} agree", inputs.fsc.resolution_text(threshold)))
        if inputs.poses is not None:
            n, share = len(inputs.poses.rotations), inputs.poses.share
            facts.append(("Particles", f"{n:,}"))
            # Of finer poses, in another program's table, none is ever sure.
            if share is not None and "program" in inputs.settings:
                doubtful = int((share < SURE).sum())
                facts.append(("Another pose is likely", f"{doubtful:,} ({doubtful / n:.0%})"))
        elif "input_rows" in inputs.settings:
            facts.append(("Particles", f"{inputs.settings['input_rows']:,}"))
        if inputs.map is not None:
            box, pixel = len(inputs.map.data), inputs.map.pixel_size_angst
            facts.append(("Map", f"{box} px at {pixel:.3g} A"))
            if inputs.diameter is not None:
                facts.append(("Particle diameter", f"{inputs.diameter * inputs.side_angst:.0f} A"))
        facts.append(("Job", inputs.outcome))
        return facts

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Of ``job.yaml``, nested names joined by points."""
        return _flat(self.inputs.settings)


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
