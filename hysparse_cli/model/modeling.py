"""Derives HySparse models from stock ones: their S layers become sparse attention layers."""

from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hysparse_cli.families import family_of
from hysparse_cli.model.attention import ATTENTION_NAME
from hysparse_cli.model.config import HysparseSpec, spec_of
from hysparse_cli.model.layers import GatesAndSinks, sparse_class
from hysparse_cli.model.state import ForwardOptions, forward_state, padding_mask

# Each auto class, and where it finds a family's stock class: not every family has all of them.
AUTO_CLASSES: tuple[tuple[Any, Any], ...] = (
    (AutoModel, MODEL_MAPPING),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    (AutoModelForQuestionAnswering, MODEL_FOR_QUESTION_ANSWERING_MAPPING),
)


def _mask_as_given(*, attention_mask: Any = None, **kwargs: Any) -> Any:
    """transformers' mask function for HySparse: the 2D mask or None; no 4D mask is ever built."""
    return attention_mask


AttentionMaskInterface.register(ATTENTION_NAME, _mask_as_given)


def register_models(config_class: type[PreTrainedConfig], base: type[PreTrainedConfig]) -> None:
    """Derive the HySparse model classes of a family and let transformers' auto classes find them:
    the causal language model, the decoder without a head, and what heads the family has besides.

    A head that keeps the decoder under another name (llama's for question answering) would find
    none of its weights in a checkpoint: it is left out."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base]
    for auto, stock_classes in AUTO_CLASSES:
        stock: Any = stock_classes.get(base, None)
        if stock is not None and stock.base_model_prefix == causal.base_model_prefix:
            auto.register(config_class, _derived(stock, config_class, base), exist_ok=True)


def _derived(
    stock: Any, config_class: type[PreTrainedConfig], base: type[PreTrainedConfig]
) -> type[Any]:
    model_class = type(
        f"HySparse{stock.__name__}",
        (_HySparseModel, stock),
        {"__module__": __name__, "config_class": config_class},
    )
    # transformers skips the family's weight conversion (fused experts) for classes of others
    names = (stock.__name__, base.model_type)
    found = map(get_checkpoint_conversion_mapping, names)
    if conversion := next(filter(None, found), None):
        register_checkpoint_conversion_mapping(model_class.__name__, conversion, overwrite=True)
    return model_class


class _HySparseModel:
    """Mixed into a stock model class: a decoder, or one with a head."""

    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        spec = spec_of(config)
        assert spec is not None, "a HySparse config carries its spec"
        if not spec.layers.sparse_layers:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            return
        if config._attn_implementation not in (None, ATTENTION_NAME):
            raise ValueError(_no_choice(config._attn_implementation))
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not any(isinstance(module, GatesAndSinks) for module in self.modules()):  # type: ignore[attr-defined]
            install(self, spec)  # else its decoder was made by AutoModel, and has been
        self.post_init()  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        """The decoder is a model of its own, whose stock class knows no ``GatesAndSinks``: those
        that were not loaded get their values here."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, GatesAndSinks):
                module.reset_parameters()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if self.config._attn_implementation == ATTENTION_NAME != attn_implementation:
            raise ValueError(_no_choice(attn_implementation))
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]


def install(model: Any, spec: HysparseSpec) -> None:
    """Make the S layers of a stock model, with or without a head, sparse attention layers."""
    config, decoder = model.config, model.base_model
    config._attn_implementation = ATTENTION_NAME
    path = family_of(config.model_type).attention.partition(".")[2]
    for layer in spec.layers.sparse_layers:
        attention: Any = decoder.get_submodule(path.format(layer=layer))
        stock: Any = type(attention)
        attention.__class__ = sparse_class(stock)
        attention.hysparse = GatesAndSinks(
            config.num_attention_heads,
            config.hidden_size,
            spec,
            own_sinks=hasattr(attention, "sinks"),
        )
    decoder.register_forward_pre_hook(StateHook(spec), with_kwargs=True)


def make_sparse(model: Any, spec: HysparseSpec) -> None:
    """``install`` into a loaded dense model, with the new tensors at the values they start from."""
    install(model, spec)
    for module in model.modules():
        if isinstance(module, GatesAndSinks):
            module.reset_parameters()
            module.to(model.device, model.dtype)  # the whole model's buffers must stay float32


class StateHook:
    """Forward pre-hook of the decoder: makes the state of this forward and passes it along."""

    def __init__(self, spec: HysparseSpec):
        self.spec = spec

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config: Any = decoder.config
        if kwargs.get("output_attentions", config.output_attentions):
            raise ValueError(
                "output_attentions=True: HySparse never builds attention maps, leave it out "
                "(hysparse inspect-topk shows what is attended to)"
            )
        options: ForwardOptions = kwargs.get("hysparse") or ForwardOptions()
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        positions = kwargs.get("position_ids")
        if options.rows is not None:
            inputs = positions = options.rows.position_ids
        # generate with a static cache hands a dict of masks, which not every decoder takes
        kwargs["attention_mask"] = mask = padding_mask(kwargs.get("attention_mask"))
        past = kwargs.get("past_key_values")
        kwargs["hysparse"] = forward_state(self.spec, inputs, mask, positions, past, options)
        return args, kwargs


def _no_choice(attn_implementation: Any) -> str:
    return (
        f"attn_implementation={attn_implementation!r} can't run HySparse layers: leave it out "
        "(HYSPARSE_BACKEND picks the kernels)"
    )
