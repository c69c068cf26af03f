"""timm's weights under the names of other libraries, so that one model can be run by each."""


def to_torchvision(state):
    """Weights of a timm ViT with a class token and a linear head as torchvision's `VisionTransformer` names them."""
    names = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3", "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
        "head.": "heads.head.",
    }  # fmt: skip
    converted = {}
    for key, weight in state.items():
        name = "encoder.ln." + key.removeprefix("norm.") if key.startswith("norm.") else key
        for old, new in names.items():
            name = name.replace(old, new)
        converted[name] = weight
    return converted
