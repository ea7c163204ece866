"""Which class of transformers loads a model, and which of its parts text reaches."""

from typing import Any

from .logits import decoder


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads a model with this configuration.

    ``AutoModelForCausalLM`` if it knows the configuration; for some vision-language models it loads only the text part.
    Otherwise ``AutoModelForImageTextToText``, which loads the whole model, if that knows it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    classes = AutoModelForCausalLM, AutoModelForImageTextToText
    return next((kind for kind in classes if type(config) in kind._model_mapping), classes[0])


def text_parts(model: Any) -> list[Any]:
    """Return the modules that compute log-probs of text: decoder, input embedding and output head."""
    return [decoder(model), model.get_input_embeddings(), model.get_output_embeddings()]


def freeze_other_parts(model: Any) -> Any:
    """Freeze the parameters outside of `text_parts` (an image encoder), and return the model.

    They have no gradient, and DDP would wait for one.
    """
    reached = {id(p) for part in text_parts(model) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)
    return model
