"""What an interrupted profile goes on from: the parts of its table."""

from collections.abc import Mapping, Sequence

import numpy as np

from quantkit.sensitivity.entries import Key
from quantkit.storage.work_dir import WorkDirectory


class ProfileWork(WorkDirectory):
    """A folder of named parts, losses among them."""

    def save_costs(self, name: str, losses: Mapping[Key, Sequence[float]], seconds: float) -> None:
        """Losses per entry and sequence, and the seconds they took. Raises OutputError."""
        rows = {"\t".join(key): list(values) for key, values in losses.items()}
        self.save_table(name, {"seconds": seconds, "losses": rows})

    def losses(self, name: str) -> dict[Key, np.ndarray]:
        """What `save_costs` saved."""
        found = {}
        for key, values in self.table(name)["losses"].items():
            weight, tier = key.split("\t")
            found[weight, tier] = np.array(values, np.float32)
        return found
