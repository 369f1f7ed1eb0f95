"""Reading a profile back: from a folder, or by its Hub id."""

from dataclasses import replace
from pathlib import Path

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.profile import PROFILE_FILE, SensitivityProfile
from quantkit.checkpoint import hub
from quantkit.errors import ProfileError
from quantkit.formats.tiers import kept_name, parse_tier
from quantkit.sensitivity.entries import native_cost
from quantkit.storage.json_files import load_json
from quantkit.storage.paths import user_path


def load_profile(name: str, inventory: Inventory) -> SensitivityProfile:
    """The profile in a folder, or the one published as `user/name`, for this very checkpoint.

    Raises ProfileError for another checkpoint's profile or one that lacks a weight, HubError.
    """
    folder = user_path(name)
    if not folder.exists():
        if not hub.is_repo_id(name):
            raise ProfileError(f"{name}: no such folder, and not a Hub id (user/name).")
        folder = hub.fetch_file(name, PROFILE_FILE).parent
    return read_profile(folder, inventory)


def _in_types_of(inventory: Inventory, profile: SensitivityProfile) -> SensitivityProfile:
    """`profile` with unquantized weights in the float type that `inventory` gives them: the same
    values, rounded to another type, count as kept."""
    native = {weight.name: native_cost(weight) for weight in inventory.weights}
    weights = []
    for known in profile.weights:
        kept, wanted = kept_name(known.storage), native.get(known.name)
        if wanted is not None and parse_tier(known.storage).mode == "float":
            losses = tuple(wanted if loss.tier == kept else loss for loss in known.losses)
            known = replace(known, storage=wanted.tier, losses=losses)
        weights.append(known)
    return replace(profile, weights=tuple(weights))


def read_profile(folder: Path, inventory: Inventory) -> SensitivityProfile:
    """Raises ProfileError."""
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
                f"{published[file.name]}, here {file.sha256}). Profile this checkpoint anew."
            )
    profile = _in_types_of(inventory, profile)
    lacking = {weight.name for weight in inventory.weights} - {w.name for w in profile.weights}
    if lacking:
        raise ProfileError(f"{folder}: lacks {min(lacking)}. Make it anew.")
    return profile
