"""timm's weights in the model of Hugging Face transformers, so that one model can be run by both."""

import torch
import transformers

TO_HUGGING_FACE = {
    "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "norm": "vit.layernorm", "head": "classifier",
}  # fmt: skip


def _parts(key):
    """blocks.3.attn.proj.weight -> (3, attn.proj, .weight); parts outside the blocks have block None."""
    block = None
    if key.startswith("blocks."):
        _, block, key = key.split(".", 2)
    name, dot, end = key.rpartition(".")
    return (block, name, dot + end) if end in ("weight", "bias") else (block, key, "")


def hugging_face(model):
    """timm's plain Vision Transformer as a ViTForImageClassification."""
    attn, embed = model.blocks[0].attn, model.patch_embed
    config = transformers.ViTConfig(
        hidden_size=model.embed_dim, num_hidden_layers=len(model.blocks), num_attention_heads=attn.num_heads,
        intermediate_size=model.blocks[0].mlp.fc1.out_features, image_size=embed.img_size[0],
        patch_size=embed.patch_size[0], num_labels=model.num_classes, layer_norm_eps=model.norm.eps,
    )  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        block, name, end = _parts(key)
        where = "" if block is None else f"vit.layers.{block}."
        if name == "attn.qkv":
            for part, third in zip("qkv", value.chunk(3), strict=True):
                state[f"{where}attention.{part}_proj{end}"] = third
        else:
            state[where + TO_HUGGING_FACE[name] + end] = value
    return _loaded(transformers.ViTForImageClassification(config), state)


def _loaded(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
    return model.eval()
