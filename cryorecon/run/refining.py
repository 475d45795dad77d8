"""Rounds of refinement and new searches, until poses settle; told to the log as they go."""

from __future__ import annotations

from dataclasses import dataclass

from cryorecon.conventions import shell_to_angst
from cryorecon.engines.new_search import least_likely, reassign
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction
from cryorecon.engines.rounds import RoundReport, refine_round
from cryorecon.image_table import kept
from cryorecon.maps.fsc import fsc_curve
from cryorecon.run.checkpoint import broken
from cryorecon.run.parts import FIRST_NEW_SEARCH, Parts, Place

# Images are searched again every second round while more than this share of all finds a better
# pose.
_ENOUGH_FOUND = 0.02
# With fewer images in doubt, wrong poses are among the worst that fit: after the first time, a new
# search looks at so many alone.
_FEW_IN_DOUBT, _LEAST_LIKELY = 0.02, 0.25
# After so many rounds new searches go on only while one brings this share of the log-likelihood.
_LONG, _STILL_RISING = 18, 0.01
# What ``rounds.star`` puts before the stage's name: rounds are counted anew in each part.
_IN_TABLE = {
    "half set 1": "half-set-1-",
    "half set 2": "half-set-2-",
    "all": "all-particles-",
    "symmetry": "symmetric-",
}


@dataclass
class Refining(Parts):
    """What every run does with a first pose of each image and a coarse map."""

    def refine(self, state: Reconstruction, images: ImageSet, place: Place) -> None:
        """Rounds against the half maps until they settle, then against the joint map."""
        # A state of an older version may lie in the joint rounds.
        while place.joint < 0 and not place.settled and place.number < self.config.half_rounds:
            if place.number == place.search_after:
                few = place.number > FIRST_NEW_SEARCH and state.rivals.in_doubt() < _FEW_IN_DOUBT
                share = self.search_again(state, images, few=few)
                again = share > _ENOUGH_FOUND and self._worth_it(place)
                place.search_after = place.number + 2 if again else -1
                self.save(state, images, place)
            place.number += 1
            report = self.round(state, images, place.number, joint=False)
            still = state.band <= report.band and report.pose_change_deg < self.config.settled_deg
            place.settled = still and place.search_after < 0
            place.likelihood = report.log_likelihood
            self.save(state, images, place)
        self.finish(state, images, place)

    def _worth_it(self, place: Place) -> bool:
        """Whether to search again, although many rounds are done: a hard set may still be won."""
        before, place.searched_at = place.searched_at, place.likelihood
        rising = place.likelihood - before > _STILL_RISING * abs(before)
        return place.number < _LONG or rising

    def finish(self, state: Reconstruction, images: ImageSet, place: Place) -> None:
        """Rounds against the map of all images, until poses settle."""
        if place.joint < 0:
            state.half_poses = kept(state.rotations), kept(state.offsets_px)
            place.joint = 0
        while place.joint < self.config.joint_rounds and not place.joint_settled:
            place.joint += 1
            report = self.round(state, images, place.number + place.joint, joint=True)
            still = state.band <= report.band
            place.joint_settled = still and report.pose_change_deg < self.config.joint_settled_deg
            self.save(state, images, place)

    def keep(self, state: Reconstruction, images: ImageSet, *, halves: bool = True) -> None:
        """Maps from the poses as they are; half maps and their FSC too unless told otherwise."""
        state.half_poses = kept(state.rotations), kept(state.offsets_px)
        with self.job.bar("Averaging", len(images)) as bar:
            for joint in (False, True) if halves else (True,):
                refine_round(
                    state, images, self.config, fsc_curve, joint=joint, n_steps=0, progress=bar
                )

    def search_again(self, state: Reconstruction, images: ImageSet, *, few: bool = False) -> float:
        """Images against the better map, all or those that fit worst; the share that moved."""
        before = state.searched_to(self.config)
        asked = least_likely(state, images, _LEAST_LIKELY) if few else None
        n = len(images) if asked is None else int(asked.sum())
        with self.job.bar("Searching again", n) as bar:
            share = reassign(state, images, self.config, fsc_curve, self.generator, bar, asked)
        those = ", those that fit worst" if few else ""
        if state.offset_range > before:
            those = ""
            self.job.say(
                f"many particles lie off centre: offsets to {self._range_angst(state, images):.1f} "
                "A are searched"
            )
        self.job.say(
            f"searched again{those}: {100 * share:.1f} % of the images found a better pose, "
            f"{100 * state.rivals.in_doubt():.0f} % may have another"
        )
        return share

    def round(
        self, state: Reconstruction, images: ImageSet, number: int, *, joint: bool
    ) -> RoundReport:  # fmt: skip
        """One round, told to the log and ``rounds.star``."""
        box = images.plane.box
        band_angst = self._angst(state.band, box)
        title = f"Refining {'all' if joint else 'halves'} at {band_angst:.2f} A"
        with self.job.bar(title, len(images)) as bar:
            try:
                report = refine_round(
                    state,
                    images,
                    self.config,
                    fsc_curve,
                    joint=joint,
                    n_steps=8 if number == 1 else 6,
                    progress=bar,
                )
            except FloatingPointError as error:
                raise broken(f"Round {number} of {self.part}", error) from error
        self.job.say(
            f"round {number} ({'joint' if joint else 'half'} maps) at {band_angst:.2f} A: "
            f"log-likelihood {report.log_likelihood:.2f}, poses moved "
            f"{report.pose_change_deg:.2f} deg and {report.offset_change_px:.2f} px, half maps "
            f"agree to {self._angst(report.agreement_band, box):.2f} A"
        )
        stage = f"{_IN_TABLE.get(self.part, '')}{'joint-map' if joint else 'half-maps'}"
        measured = self._measured(report, box)
        measured["cryoreconOffsetRangeAngst"] = self._range_angst(state, images)
        self.job.record_round(stage, number, measured)
        return report

    def _range_angst(self, state: Reconstruction, images: ImageSet) -> float:
        """Largest offset that has been searched."""
        return state.searched_to(self.config) * images.plane.box * self.pixel_size_angst

    def _measured(self, report: RoundReport, box: int) -> dict[str, float]:
        """What a round found, for its row of ``rounds.star``."""
        return {
            "cryoreconResolutionUsed": self._angst(report.band, box),
            "cryoreconPoseChange": report.pose_change_deg,
            "cryoreconOffsetChangeAngst": report.offset_change_px * self.pixel_size_angst,
            "cryoreconLogLikelihood": report.log_likelihood,
            "cryoreconHalfMapResolution": self._angst(report.agreement_band, box),
        }

    def _angst(self, shell: float, box: int) -> float:
        return shell_to_angst(shell, box, self.pixel_size_angst)
