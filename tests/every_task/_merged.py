"""An exported adapter, put on its base by peft and merged there, unless the run did: nothing of ours takes part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests import every_task


def merged(folder: str, name: str) -> str:
    """Return the folder of the whole model: in the working directory, the run's result beside it, or as exported."""
    import transformers
    from peft import PeftModel

    if every_task.load(name).merges:
        assert not (Path(folder) / "adapter_config.json").exists()
        return folder
    about = json.loads((Path(folder) / "adapter_config.json").read_text())
    kind = getattr(transformers, about["auto_mapping"]["base_model_class"])
    config = transformers.AutoConfig.from_pretrained(folder)
    base = kind.from_pretrained(about["base_model_name_or_path"], config=config, dtype="float64")
    model = PeftModel.from_pretrained(base, folder).merge_and_unload()
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    target = f"merged-{name}/model"
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    shutil.copy(Path(folder).parent / "result.json", f"merged-{name}")
    return target
