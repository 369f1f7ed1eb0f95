"""Read a profile: from a folder, or by its Hub id."""

from dataclasses import replace
from pathlib import Path

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.checkpoint import hub
from quantkit.errors import ProfileError
from quantkit.formats.tiers import native_name, parse_tier
from quantkit.sensitivity.entries import native_cost
from quantkit.storage.json_files import load_json
from quantkit.storage.paths import PROFILE_FILE, user_path


def load_profile(name: str, inventory: Inventory) -> SensitivityProfile:
    """Load the profile in a folder, or published as `user/name`, for this very checkpoint.

    Raises ProfileError for a profile of another checkpoint, or without some weight; HubError.
    """
    folder = user_path(name)
    if not folder.exists():
        if not hub.is_repo_id(name):
            raise ProfileError(f"{name}: neither a folder nor a Hub id (user/name).")
        folder = hub.fetch_file(name, PROFILE_FILE).parent
    return read_profile(folder, inventory)


def _in_types_of(inventory: Inventory, profile: SensitivityProfile) -> SensitivityProfile:
    """Return `profile` with unquantized weights in the float type of `inventory`.

    The same values in another float type count as native.
    """
    native = {weight.name: native_cost(weight) for weight in inventory.weights}
    weights = []
    for profiled in profile.weights:
        native_tier, wanted = native_name(profiled.storage), native.get(profiled.name)
        if wanted is not None and parse_tier(profiled.storage).mode == "float":
            costs = tuple(wanted if cost.tier == native_tier else cost for cost in profiled.costs)
            profiled = replace(profiled, storage=wanted.tier, costs=costs)
        weights.append(profiled)
    return replace(profile, weights=tuple(weights))


def read_profile(folder: Path, inventory: Inventory) -> SensitivityProfile:
    """Read the profile in a local folder. Raises ProfileError."""
    path = folder if folder.is_file() else folder / PROFILE_FILE
    profile = SensitivityProfile.from_json(load_json(path, ProfileError), str(folder))
    if profile.source.structure != inventory.source.structure:
        raise ProfileError(
            f"{folder}: a profile of another checkpoint ({profile.source.name}), not of "
            f"{inventory.source.name}."
        )
    published = {file.name: file.sha256 for file in profile.source.files}
    for file in inventory.source.files:
        if file.sha256 is not None and published.get(file.name) not in (None, file.sha256):
            raise ProfileError(
                f"{folder}: was measured on another {file.name} (sha256 "
                f"{published[file.name]}, here {file.sha256}). Profile this checkpoint again."
            )
    profile = _in_types_of(inventory, profile)
    lacking = {weight.name for weight in inventory.weights} - {w.name for w in profile.weights}
    if lacking:
        raise ProfileError(f"{folder}: lacks {min(lacking)}. Make it again.")
    return profile
