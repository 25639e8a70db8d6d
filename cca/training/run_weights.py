"""Which weights are sampled from: published ones, a file, or those of a run, which may still be going on."""

from dataclasses import dataclass
from pathlib import Path

from cca.data.labels import class_folders, own_names
from cca.training.checkpoints import load_run_weights, weights_of_run
from models import ARImageModel, UserError, find_files, zoo_entry
from models.utils.files import read_json, read_own_json
from models.zoo.loading import ModelFiles
from models.zoo.registry import class_name


@dataclass(frozen=True)
class ChosenWeights:
    """What ``--model``, ``--weights`` and the like mean, as they were given, at this moment."""

    given: tuple[str, str, str | None, int | None]
    files: ModelFiles
    state: tuple[Path, bool] | None  # a saved state that is taken instead, and whether its average is meant

    def plan(self, model: ARImageModel) -> dict[str, str]:
        """What is shown before the work; see ``ModelFiles.plan``."""
        if not self.state:
            return self.files.plan(model, self.given[1])
        folder, average = self.state
        text = f"average of {folder}" if average else str(folder)
        named = "" if self.given[1] == str(folder) else f"{self.given[1]}: "
        return self.files.plan(model, self.given[1], named + text)

    def known(self) -> dict:
        """What ``load`` will note of the files, as far as it is known without reading or downloading more."""
        return {**self.files.known(), "weights": self.given[1]}

    def class_names(self, model: ARImageModel) -> list[str]:
        """Name of each class, [num_classes]: of a run's own classes the folders', of others the model's."""
        names = [class_name(label, model.num_classes) for label in range(model.num_classes)]
        weights = self.state[0].parent if self.state else self.files.weights
        if weights and (config := read_own_json(weights.with_name("config.json"))):
            folders = class_folders(config.get("data")) or {}
            for label, name in own_names(folders, model.num_classes).items():
                names[label] = name
        return names

    def load(self, model: ARImageModel) -> dict:
        """Fill the model that ``files`` built, on the CPU, downloading what is published.

        Returns what is noted of its files. Raises UserError.
        """
        files = self.files.fill(model)
        described = {**files.known(), "weights": self.given[1]}
        if self.state:
            try:
                described["weights_sha256"] = load_run_weights(model, *self.state)
            except UserError:
                if (now := choose_weights(*self.given)).state != self.state:
                    return now.load(model)  # the run has saved a newer one meanwhile
                raise
        return described


def choose_weights(
    name: str, weights: str, tokenizer_weights: str | None = None, image_size: int | None = None
) -> ChosenWeights:
    """The weights of these options, without network; of a run that goes on, its newest state.

    Arguments and errors as in ``models.find_files``; ``weights`` may also name a run or a saved state of
    it (see ``weights_of_run``).
    """
    found = weights_of_run(weights, zoo_entry(name).backbone.checkpoint_name)
    if found is not None:
        refuse_other_models(found[0], name, weights)
    state = found if found is not None and found[0].is_dir() else None
    file = weights if found is None else None if state else str(found[0])
    files = find_files(name, file, tokenizer_weights, image_size)
    return ChosenWeights((name, weights, tokenizer_weights, image_size), files, state)


def refuse_other_models(path: Path, name: str, weights: str) -> None:
    """Raise UserError where a run's state, or its exported file, is of another model than ``name``."""
    file = (path.parent.parent if path.is_dir() else path.parent) / "config.json"
    if file.is_file():
        read_json(file)  # refuses a damaged one, whose class names would be missing
    config = read_own_json(file)
    made = config["options"].get("model", name) if config else name
    if made != name:
        raise UserError(f"--weights: {weights} is a run of {made}, not of {name}")
