"""Calibrated quantization of a plan: layer by layer, then scale tuning, as one generator."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.artifacts.calibration import ExpertInputs
from quantkit.artifacts.plan import Plan
from quantkit.backend import mx
from quantkit.formats.tiers import parse_tier
from quantkit.progress import Progress, Stage, silent
from quantkit.quantizers.layer_files import EMBEDDING, LayerFiles, QuantizedWeight
from quantkit.quantizers.layerwise import EMBEDDING_TOKENS, LayerwiseQuantizer, changed_tiers
from quantkit.quantizers.scale_tuning import ScaleTuner, Tuning, TuningText
from quantkit.storage.work_dir import Tensors, WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel


@dataclass(frozen=True)
class QuantizerText:
    """Token ids (sequences, length) of a calibrated quantizer.

    `calibrate` makes the Hessians, `validate` chooses among their priors, `tuning` is for scale
    tuning.
    """

    calibrate: np.ndarray
    validate: np.ndarray
    tuning: TuningText


@dataclass(frozen=True)
class CalibratedQuantization:
    """A plan to quantize on text."""

    model: StreamingModel
    plan: Plan
    text: QuantizerText

    def weights(
        self, shards: Sequence[Sequence[str]], folder: Path, progress: Progress
    ) -> Iterator[QuantizedWeight]:
        """Yield the quantized weights of `shards`, which list names in the order of the model.

        The tensors are None for a weight to be rounded to nearest. Asking for a weight of the next
        shard means that the last one is complete: its files in `folder`, the work directory, are
        removed.
        """
        files = LayerFiles(WorkDirectory(folder))
        layers = len(self.model.layers)
        layerwise = self._layerwise(files, progress.stage("Quantizing", layers + 2, "layers"))
        tuner = self._tuned(layerwise, files, progress) if self.plan.tuning_steps else None
        pending = {name for names in shards for name in names if name in layerwise.tiers}
        loaded: tuple[int | None, dict[str, Tensors]] = (None, {})
        for names in shards:
            for name in names:
                number = layerwise.stage_of(name) if name in pending else None
                if number is None:
                    yield name, None
                    continue
                if loaded[0] != number:
                    tensors = layerwise.load(number)
                    if tuner and EMBEDDING < number < layers:
                        tensors = tuner.tensors(number)
                    loaded = (number, tensors)
                yield name, loaded[1].get(name)
            pending -= set(names)
            unfinished = {layerwise.stage_of(name) for name in pending}
            stages = {n for name in names if (n := layerwise.stage_of(name)) is not None}
            for number in stages - unfinished:
                files.drop(number)

    def _layerwise(self, files: LayerFiles, stage: Stage) -> LayerwiseQuantizer:
        tokens = mx.array(np.concatenate([self.text.calibrate, self.text.validate]))
        count = len(self.text.calibrate)
        return LayerwiseQuantizer(self.model, self.plan, tokens, count, files, stage)

    def expert_inputs(self, folder: Path) -> dict[str, ExpertInputs]:
        """Return how many inputs the experts of each stack had, as noted in the work directory."""
        return self._layerwise(LayerFiles(WorkDirectory(folder)), silent).expert_inputs()

    def _tuned(
        self, layerwise: LayerwiseQuantizer, files: LayerFiles, progress: Progress
    ) -> ScaleTuner:
        """Quantize everything, tune the scales of layers, and return the tuner."""
        layerwise.load(len(self.model.layers))
        tuning = Tuning(self.plan.tuning_steps)
        stage = progress.stage("Tuning scales", tuning.steps, "steps")
        tiers = changed_tiers(self.model.source, self.plan)
        tuner = ScaleTuner(self.model, tiers, files, tuning, self.text.tuning, stage)
        if not tuner.complete:
            layerwise.load(EMBEDDING)
        tuner.run()
        return tuner

    def work_bytes(self, shard_bytes: int) -> int:
        """Return the disk space, in bytes, that the work directory needs."""
        plan, layers = self.plan, len(self.model.layers)
        by_layer = [sum(a.bytes for a in plan.assignments if a.layer == i) for i in range(layers)]
        affine = [
            (assignment, tier)
            for assignment in plan.assignments
            if (tier := parse_tier(assignment.storage)).mode == "affine"
        ]
        tokens = self.text.calibrate.size + self.text.validate.size
        stream = 4 * self.model.head_weight.shape[-1]  # bytes per token
        # The streams of two layers, the inputs of experts, two layers, and those of an incomplete
        # shard.
        space = (2 * stream + self._expert_bytes()) * tokens + 2 * max(by_layer, default=0)
        space += min(shard_bytes, plan.total_bytes)
        if any(assignment.role == "embedding" for assignment, _ in affine):
            # The inputs of all layers, for the backward pass.
            space += stream * min(self.text.calibrate.size, EMBEDDING_TOKENS) * (layers + 3)
        if plan.tuning_steps:
            # All quantized layers, and per group two generations of six float32 values, the mean
            # and the spread of the integers, and the best scale and bias.
            groups = sum(a.parameters // tier.group_size for a, tier in affine)
            space += plan.total_bytes + 60 * groups
        return space

    def _expert_bytes(self) -> int:
        """Return the bytes per token of the inputs of a layer's experts."""
        stacks = [w for w in self.model.weights.values() if len(w.shape) > 2]
        widths = {weight.shape[-1] for weight in stacks}
        active = self.model.source.checkpoint.settings.experts_per_token or 1
        return 4 * active * 2 * max(widths, default=0)
