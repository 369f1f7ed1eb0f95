"""The work directory of a profile: measured costs beside arrays and tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from quantkit.sensitivity.entries import EntryKey
from quantkit.storage.work_dir import WorkDirectory


class ProfileWork(WorkDirectory):
    """A work directory with KL costs."""

    def save_costs(
        self, name: str, costs: Mapping[EntryKey, Sequence[float]], seconds: float
    ) -> None:
        """Save KL costs per entry and sequence, and the seconds of their measurement. Raises
        OutputError.
        """
        rows = {"\t".join(key): list(values) for key, values in costs.items()}
        self.save_table(name, {"seconds": seconds, "costs": rows})

    def costs(self, name: str) -> dict[EntryKey, np.ndarray]:
        """Read the costs (sequences,) per entry that `save_costs` wrote."""
        costs = {}
        for key, values in self.table(name)["costs"].items():
            weight, tier = key.split("\t")
            costs[weight, tier] = np.array(values, np.float32)
        return costs
