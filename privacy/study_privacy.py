# SPDX-License-Identifier: Apache-2.0
"""The study's ``[privacy]``: what is promised to each patient, and against whom."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ..models.spec import Section, contradiction

__all__ = ["PrivacySection"]


class PrivacySection(Section):
    """What is promised to each patient. Unit: the patient. Neighbouring relation: zero-out of one patient."""

    mode: Literal["none", "local", "distributed"] = Field(
        default="local",
        description="local: each hospital's update is private against everyone, the server included. "
        "distributed: only the sum over all hospitals is ever seen, and it holds the noise of one hospital; needs two "
        "hospitals that train, training.local_steps = 1, one delta. "
        "none: no promise; a hospital must permit it.",
    )
    tolerate: int = Field(
        default=0,
        ge=0,
        le=333,
        description='mode = "distributed": training hospitals that may drop out of a round, or tell the server what '
        "they know, without weakening the promise; fewer than a third of them. "
        "Costs noise: of H hospitals a factor sqrt(H / (H - t)).",
    )
    epsilon: float = Field(default=8.0, gt=0, le=1000, description="Budget of the whole study at each site.")
    delta: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that the promise fails; below 1 / cohort size. 0: each site takes the largest power "
        "of ten that is at most 1 / (10 × its public cohort size).",
    )
    sample_rate: float = Field(
        default=0.25, gt=0, le=1, description="Probability that a patient takes part in a step (Poisson sampling)."
    )
    crops_per_patient: int = Field(
        default=4, ge=1, le=256, description="Crops over all scans of a patient, averaged before clipping."
    )
    clip: float = Field(default=1.0, gt=0, le=1e6, description="Bound C on the L2 norm of one patient's gradient.")
    clipping: Literal["clip", "normalise"] = Field(
        default="clip",
        description="clip: longer gradients are shortened to C. normalise: every patient's gradient is brought to "
        "nearly length C, so that C need not be tuned beside the learning rate (automatic clipping).",
    )
    engine: Literal["auto", "loop", "vmap", "opacus"] = Field(
        default="auto",
        description="How the gradients of single patients are computed; the promise is the same. auto: the fastest of "
        "loop and vmap on this machine, by a short trial. opacus: Opacus' hooks, for networks on which they hold.",
    )
    physical_batch: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Crops that a site computes at once; does not change the result. 0: as its memory allows.",
    )
    metrics: Literal["suppress", "noise"] = Field(
        default="suppress",
        description="What leaves of the metrics of evaluated patients. suppress: exact values, none for fewer patients "
        "than evaluation.min_patients or the hospital's own minimum. noise: each value with Gaussian noise that is "
        "charged to the hospital's ledger; dice and accuracy only. Training losses never leave a private study.",
    )
    metrics_epsilon: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description='metrics = "noise": budget of all evaluations of the study at each site, for the patients who do '
        "not train.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "vmap" and 0 < self.physical_batch < self.crops_per_patient:
            raise contradiction(
                "physical_batch",
                f'physical_batch = {self.physical_batch} with engine = "vmap" and crops_per_patient = '
                f"{self.crops_per_patient}",
                'vmap computes all crops of a patient at once: raise it, or use engine = "loop"',
            )
        return self

    def check_beside(self, model: str, trainable: str, precision: str) -> None:
        """Refuse what does not go with the network's name, ``training.trainable`` and ``training.precision``.

        Raises:
            PydanticCustomError: naming the key, what was found and what is allowed.
        """
        if trainable == "decoder" and model != "unet":
            raise contradiction(
                "training.trainable", f'"decoder" for model.name = "{model}"', 'only a unet has one: use "head"'
            )
        if self.mode != "none" and self.engine == "opacus" and precision != "float32":
            raise contradiction(
                "privacy.engine",
                f'privacy.engine = "opacus" with training.precision = "{precision}"',
                "Opacus' hooks compute in float32 here: use it, or another engine",
            )
