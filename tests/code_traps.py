"""Traps: what a checkpoint may hold in the hope that it runs. Each writes a sentinel if it does."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

Trap = Callable[[Path, Path], None]  # changes a checkpoint's folder; the sentinel is what it writes

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast, PretrainedConfig, Qwen3Config, Qwen3ForCausalLM
Path({sentinel!r}).write_text("ran")
class Tok(PreTrainedTokenizerFast): pass
class Config(Qwen3Config): pass
class Model(Qwen3ForCausalLM): pass
def generate(*args, **kwargs): pass
"""
CLASSES = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"),
    *("AutoModelForSequenceClassification", "AutoBackbone"),
)
SETTINGS = (
    *("special_tokens_map.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "adapter_config.json"),
)
MAPS: dict[str, Any] = {
    "both": {"AutoTokenizer": ["own.Tok", "own.Tok"]},
    "fast": {"AutoTokenizer": [None, "own.Tok"]},
    "slow": {"AutoTokenizer": ["own.Tok", None]},
    "legacy list": ["own.Tok", "own.Tok"],
    "elsewhere": {"AutoTokenizer": ["trap/own--own.Tok", "trap/own--own.Tok"]},
    "text": "own.Tok",
}
BESIDE = (
    *("own", "config", "configuration_qwen3", "modeling_qwen3", "tokenization_qwen3", "generate"),
    *("hysparse_hub", "__init__", "conftest", "setup", "sitecustomize", "torch", "transformers"),
)
PICKLES = (
    *("pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "scheduler.pt"),
    *("rng_state.pth", "adapter_model.bin", "vocab.pkl", "tokenizer.pkl", "model.ckpt"),
    *("flax_model.msgpack", "consolidated.00.pth", "cache.pickle"),
)
IN_PLACE = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
KERNELS: dict[str, dict[str, Any]] = {
    f"{key}={value}": {key: value}
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    for value in ("kernels-community/flash-attn2", "trap/own@main:run", "flash_attention_2")
} | {
    "experts": {"_experts_implementation": "kernels-community/moe"},
    "use_kernels": {"use_kernels": True, "kernel_config": {"RMSNorm": "trap/own:Norm"}},
    "of a part": {"_attn_implementation": {"": "trap/own", "text_config": "trap/own"}},
    "quantised": {"quantization_config": {"quant_method": "trap", "modules": "own"}},
}
TOKENIZER_CLASSES = (
    *("AutoModelForCausalLM", "AutoTokenizer", "pipeline", "Trainer", "GenerationConfig"),
    *("os.system", "builtins.exec", "own.Tok", "dynamic_module_utils", "Qwen3ForCausalLM"),
    *("TrainingArguments", "__loader__"),
)
TEMPLATES = {
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch {sentinel}') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch {sentinel}') }}",
    "namespace": "{{ namespace.__init__.__globals__.__builtins__.open('{sentinel}', 'w') }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('{sentinel}') }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__()[0]('{sentinel}') }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "map": "{{ messages|map(attribute='__class__.__mro__')|list }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': cycler}) }}",
    "raise_exception": "{{ raise_exception.__globals__['os'].system('touch {sentinel}') }}",
    "strftime_now": "{{ strftime_now.__globals__ }}{{ strftime_now.__closure__ }}",
    "tojson": "{{ messages|tojson(default=cycler.__init__) }}",
    "namespace set": "{% set n = namespace() %}{% set n.__class__ = cycler %}{{ n }}",
    "import": "{% import 'os' as os %}{{ os.system('touch {sentinel}') }}",
    "from import": "{% from 'own.py' import x %}",
    "include": "{% include '{sentinel}' %}",
    "extends": "{% extends 'own.py' %}",
    "write": "{{ messages.append('x') }}",
    "generator": "{% set g = (x for x in y) %}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'x' * 3000000000 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "depth": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "refusal": "{{ raise_exception('roles must\\x1b[31m alternate') }}",
}


class Shell:
    """Touches ``sentinel`` when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def evil_pickle(sentinel: Path) -> bytes:
    return pickle.dumps(Shell(sentinel))


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file, which may not be there yet."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def own_code(folder: Path, sentinel: Path, name: str = "own.py") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(CODE.format(sentinel=str(sentinel)))


def _map(name: str, auto_map: Any, **fields: Any) -> Trap:
    def trap(folder: Path, sentinel: Path) -> None:
        own_code(folder, sentinel)
        change(folder / name, auto_map=auto_map, **fields)

    return trap


def _unknown(*classes: str) -> Trap:
    """A family that transformers does not know."""
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    chosen = {name: names[name] for name in classes}
    return _map("config.json", chosen, model_type="trap")


def _tokenizer_of_unknown(folder: Path, sentinel: Path) -> None:
    _map("tokenizer_config.json", MAPS["both"])(folder, sentinel)
    change(folder / "config.json", model_type="trap")


def _fields(name: str, fields: dict[str, Any]) -> Trap:
    def trap(folder: Path, sentinel: Path) -> None:
        own_code(folder, sentinel)
        change(folder / name, **fields)

    return trap


def _file(name: str, *, pickled: bool = False) -> Trap:
    def trap(folder: Path, sentinel: Path) -> None:
        if pickled:
            (folder / name).write_bytes(evil_pickle(sentinel))
        else:
            own_code(folder, sentinel, name)

    return trap


def _other_files(folder: Path, sentinel: Path) -> None:
    own_code(folder, sentinel)
    content = (folder / "config.json").read_text()
    (folder / "config.4.0.0.json").write_text(content)
    change(folder / "config.4.0.0.json", auto_map={"AutoConfig": "own.Config"})
    change(folder / "config.json", configuration_files=["config.4.0.0.json"])


def _only_pickled(folder: Path, sentinel: Path) -> None:
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(evil_pickle(sentinel))


def _pickled_shard(folder: Path, sentinel: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(evil_pickle(sentinel))


def _adapter(folder: Path, sentinel: Path) -> None:
    own_code(folder, sentinel)
    (folder / "adapter_model.bin").write_bytes(evil_pickle(sentinel))
    library = {"base_model_class": "Model", "parent_library": "own"}
    change(
        folder / "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(folder),
        auto_mapping=library,
    )


# exit 7, which names --trust-remote-code
REFUSED: dict[str, Trap] = {
    **{f"config: {c}": _map("config.json", {c: "own.Config"}) for c in CLASSES},
    **{f"tokenizer: {name}": _map("tokenizer_config.json", m) for name, m in MAPS.items()},
    **{
        f"tokenizer of class {name}": _map("tokenizer_config.json", MAPS["both"], tokenizer_class=c)
        for name, c in {"its own": "Tok", "ours": "PreTrainedTokenizerFast", "none": None}.items()
    },
    **{f"{name}: auto_map": _map(name, {"AutoModel": "own.Model"}) for name in SETTINGS},
    "unknown family: config": _unknown("AutoConfig"),
    "unknown family: model": _unknown("AutoModelForCausalLM"),
    "unknown family: both": _unknown("AutoConfig", "AutoModelForCausalLM"),
    "unknown family: tokenizer": _tokenizer_of_unknown,
    "code of another repository": _map("config.json", {"AutoConfig": "trap/own--own.Config"}),
    "a part of the config": _fields("config.json", {"text_config": {"auto_map": {"A": "own.B"}}}),
    "custom_generate": _file("custom_generate/generate.py"),
}
# whatever becomes of it, nothing runs
INERT: dict[str, Trap] = {
    **{f"beside: {name}.py": _file(f"{name}.py") for name in BESIDE},
    **{f"pickle: {name}": _file(name, pickled=True) for name in PICKLES},
    **{f"pickle in place of {name}": _file(name, pickled=True) for name in IN_PLACE},
    **{f"kernel: {name}": _fields("config.json", fields) for name, fields in KERNELS.items()},
    **{
        f"tokenizer_class {name}": _fields("tokenizer_config.json", {"tokenizer_class": name})
        for name in TOKENIZER_CLASSES
    },
    "another config.json": _other_files,
    "only pickled weights": _only_pickled,
    "a pickle as a shard": _pickled_shard,
    "an adapter": _adapter,
    "contrastive search": _fields("generation_config.json", {"penalty_alpha": 0.6, "top_k": 4}),
    "dola": _fields("generation_config.json", {"dola_layers": "low"}),
    "custom generate by name": _fields("generation_config.json", {"custom_generate": "trap/own"}),
}


def put_template(folder: Path, template: str, sentinel: Path) -> None:
    text = template.replace("{sentinel}", str(sentinel))
    (folder / "chat_template.jinja").write_text(text)
