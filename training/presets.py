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
_VAR = dict(
    tokenizer="var_vq", lr_schedule="lin0", weight_decay=0.05, ema_rate=0.0, grad_clip=2.0, flip=False
)  # without an average of the weights
_VAR_IMAGENET = dict(  # on 8 processes
    _VAR, data="imagefolder", img_size=256, batch_size=96, blr=1e-4, init_adaln_gamma=1e-3, wpe=0.1,
    eval_bsz=64, cfg=2.5, top_k=900, top_p=0.96,
)  # fmt: skip
_DIGITS = dict(
    _PIXELS, img_size=8, patch_size=1, vae_embed_dim=1, epochs=45, warmup_epochs=3, diffloss_w=64,
    diffusion_batch_mul=2, eval_freq=20, save_last_freq=10, cfg=1.5, num_images=1800, eval_bsz=150, features="digits",
)  # fmt: skip
PRESETS = {
    "digits": dict(_DIGITS, data="digits"),
    "mnist": dict(_GREY_28, data="mnist"),
    "fashion_mnist": dict(_GREY_28, data="fashion_mnist"),
    "cifar10": dict(
        _PIXELS, data="cifar10", model="mar_mini", img_size=32, patch_size=4, vae_embed_dim=3, diffloss_w=192,
        batch_size=32, diffusion_batch_mul=1, epochs=100, warmup_epochs=2, num_images=10000,
    ),
    "cifar10_small": dict(  # 28 M, for a GPU
        _PIXELS, data="cifar10", model="mar_small", img_size=32, patch_size=4, vae_embed_dim=3, diffloss_d=4,
        diffloss_w=640, buffer_size=16, batch_size=256, diffusion_batch_mul=4, epochs=68, warmup_epochs=2, cfg=2.0,
        cfg_schedule="constant", num_sampling_steps=10, solver="dpmpp_sde", num_images=5000, eval_bsz=100,
        features="cifar10",
    ),
    "canvases": dict(_DIGITS, data="canvases"),
    "var_digits": dict(
        _VAR, data="digits", model="var_tiny", img_size=8, batch_size=32, blr=8e-2, epochs=12, warmup_epochs=0.5,
        wpe=0.05, init_adaln_gamma=1e-2, num_workers=0, eval_freq=20, save_last_freq=4, cfg=1.5, num_images=1800,
        eval_bsz=300, features="digits",
    ),
    "var_d16": dict(_VAR_IMAGENET, model="var_d16", epochs=200, warmup_epochs=4),  # published FID 3.55
    "var_d20": dict(_VAR_IMAGENET, model="var_d20", epochs=250, warmup_epochs=5),  # published FID 2.95
    "var_d24": dict(  # published FID 2.33
        _VAR_IMAGENET, model="var_d24", epochs=350, warmup_epochs=7, blr=8e-5, init_adaln_gamma=1e-4, wpe=0.01
    ),
    "var_d30": dict(  # published FID 1.97, in batches of 1024
        _VAR_IMAGENET, model="var_d30", epochs=350, warmup_epochs=7, batch_size=128, blr=8e-5, init_adaln_gamma=1e-5,
        wpe=0.01, wd_end=0.08,
    ),
    "var_d36_s": dict(  # 512 px; published FID 2.63
        _VAR_IMAGENET, model="var_d36_s", img_size=512, tokenizer="var_vq_512", epochs=350, warmup_epochs=7, blr=8e-5,
        init_adaln_gamma=5e-6, wpe=0.01, wd_end=0.08,
    ),
    "mar_base": dict(_IMAGENET, model="mar_base", diffloss_d=6, diffloss_w=1024, cfg=2.9),  # published FID 2.31
    "mar_large": dict(_IMAGENET, model="mar_large", diffloss_d=8, diffloss_w=1280, cfg=3.0),  # published FID 1.78
    "mar_huge": dict(_IMAGENET, model="mar_huge", diffloss_d=12, diffloss_w=1536, cfg=3.2),  # published FID 1.55
}  # fmt: skip
