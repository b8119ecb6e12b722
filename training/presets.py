"""Defaults of known settings: what --preset stands for, and where MAR's command line differs from its constructor."""

# where MAR's command line and its constructor disagree, the command line counts; the size of the diffusion MLP only
# with the models that MAR has published
CLI_DEFAULTS = dict(diffusion_batch_mul=1)
PUBLISHED_DEFAULTS = dict(diffloss_d=12, diffloss_w=1536)
OF_IMAGES = {"img_size", "vae_stride", "vae_embed_dim", "patch_size"}
KL16 = dict(vae_stride=16, vae_embed_dim=16)
_PIXELS = dict(
    tokenizer="pixel", model="mar_tiny", vae_stride=1, diffloss_d=3, diffloss_w=128, diffusion_batch_mul=4,
    label_drop_prob=0.1, buffer_size=4, attn_dropout=0.0, proj_dropout=0.0, num_workers=0, batch_size=64, blr=8e-3,
    lr_schedule="cosine", ema_rate=0.999, num_sampling_steps=25, num_iter=8,
)  # fmt: skip
_GREY_28 = dict(
    _PIXELS, img_size=28, patch_size=2, vae_embed_dim=1, epochs=40, warmup_epochs=1, num_images=10000
)  # fmt: skip
_IMAGENET = dict(
    data="imagefolder", epochs=800, warmup_epochs=100, batch_size=64, diffusion_batch_mul=4, num_iter=256,
    eval_bsz=256, temperature=1.0,
)  # fmt: skip
PRESETS = {
    "digits": dict(
        _PIXELS, data="digits", img_size=8, patch_size=1, vae_embed_dim=1, epochs=45, warmup_epochs=3, diffloss_w=64,
        diffusion_batch_mul=2, eval_freq=20, save_last_freq=10, cfg=1.5, num_images=1800, eval_bsz=300,
        features="digits",
    ),
    "mnist": dict(_GREY_28, data="mnist"),
    "fashion_mnist": dict(_GREY_28, data="fashion_mnist"),
    "cifar10": dict(
        _PIXELS, data="cifar10", model="mar_mini", img_size=32, patch_size=4, vae_embed_dim=3, diffloss_w=192,
        batch_size=32, diffusion_batch_mul=1, epochs=100, warmup_epochs=2, num_images=10000,
    ),
    "mar_base": dict(_IMAGENET, model="mar_base", diffloss_d=6, diffloss_w=1024, cfg=2.9),  # published FID 2.31
    "mar_large": dict(_IMAGENET, model="mar_large", diffloss_d=8, diffloss_w=1280, cfg=3.0),  # published FID 1.78
    "mar_huge": dict(_IMAGENET, model="mar_huge", diffloss_d=12, diffloss_w=1536, cfg=3.2),  # published FID 1.55
}  # fmt: skip
