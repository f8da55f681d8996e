"""Models by name, as the ecosystem has it: `MetaLM.from_pretrained(dir_or_id)`, `.save_pretrained(dir)`, `.push_to_hub(id)`.

All three speak of exports (`metalm/pretrained.py`): what a run wrote is what they load, write, and upload.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

import metalm
from metalm.card import fill_in, model_card
from metalm.data.tokenizer import Tokenizer
from metalm.errors import CheckpointError, ConfigError
from metalm.models import MODELS
from metalm.pretrained import CARD, CONFIG, PATTERNS, files_of, find_export, load_pretrained, read_model_config, save_pretrained


class PretrainedModel(nn.Module):
    """What all of `metalm.models.MODELS` are.

    Attributes:
        tokenizer: the one that the model was trained with; None before it was saved or loaded once.
        card: its model card, of the export that it was loaded from; empty: one is made when it is saved.
    """

    tokenizer: Tokenizer | None = None
    card: str = ""

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype | None = None) -> Self:
        """An export's model, in evaluation mode, with its `tokenizer`.

        Args:
            name: a run, an export's folder, or a Hub id.
            dtype: of all weights; None: as they are stored.

        Raises:
            CheckpointError: there is no export, it does not fit, or it holds a model of another class.
        """
        folder = find_export(name)
        own = MODELS[read_model_config(folder).get("type", MODELS.default)]
        if not issubclass(own, cls):
            raise CheckpointError(
                f"{name} holds a {own.__name__}, no {cls.__name__}: load it by {own.__name__}.from_pretrained"
            )
        return load_pretrained(folder, dtype)[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes an export; of a model that was loaded as it was stored, the same files once more (but no adapters).

        Raises:
            CheckpointError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError("an export holds a tokenizer: set `model.tokenizer` to the one that it was trained with")
        weights = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        card = self.card or model_card(self, weights, self.tokenizer.size)
        save_pretrained(weights, self, self.tokenizer, folder, card)

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Uploads the model as an export; see `push_export`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_export(folder, repo_id, private)


def push_export(name: str | Path, repo_id: str, private: bool = False, results: Sequence[str | Path] = ()) -> str:
    """Uploads an export to the Hugging Face Hub, in one commit; returns its address.

    Of an older export in the same place nothing is left; what else is there stays.

    Args:
        name: a run, or an export's folder.
        repo_id: `user/name`, or `name` under the user whose token is used; it is made where it does not exist.
        private: whether only its owners see it, where it is made.
        results: what `metalm evaluate` wrote, for the card.

    Raises:
        ConfigError: the Hub allows no such name.
        CheckpointError: there is no export, the Hub cannot be reached, or does not let us write.
        DataError: a file is no result.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HFValidationError

    folder = find_export(name)
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{folder} has no model card ({CARD}): load the model and write it by `save_pretrained`")
    card = (folder / CARD).read_text()
    files = sorted(path for pattern in PATTERNS for path in folder.rglob(pattern) if path != folder / CARD)
    fill_in(card, repo_id, results)  # before anything is made on the Hub
    try:
        api = HfApi(library_name="metalm", library_version=metalm.__version__)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        changes = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        changes.append(CommitOperationAdd(CARD, fill_in(card, repo.repo_id, results).encode()))
        there = set(api.list_repo_files(repo.repo_id))
        if CONFIG in there:
            old = files_of(Path(api.hf_hub_download(repo.repo_id, CONFIG)).read_bytes())
            stale = there & old - {change.path_in_repo for change in changes}
            changes += [CommitOperationDelete(name) for name in sorted(stale)]
        api.create_commit(repo.repo_id, changes, commit_message=f"METALM {metalm.__version__}")
    except HFValidationError as error:
        raise ConfigError(f"the Hub allows no model called {repo_id!r}: write user/name ({error})") from error
    except Exception as error:  # of the client, its transport, or OSError, without a common base
        raise CheckpointError(f"{repo_id}: {why(error)}") from error
    return str(repo)


def why(error: Exception) -> str:
    """What went wrong in an upload, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub does not know us: log in by `hf auth login`, or set HF_TOKEN to a token that may write ({reason})"
    if status == 403:
        return f"the Hub does not let us write there: take a name of your own, or a token that may write ({reason})"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub may not be asked while HF_HUB_OFFLINE is set"
    if status is not None:
        return f"the Hub refused the upload: {reason}"
    return f"the Hub cannot be reached; the export is still where it was ({reason})"
