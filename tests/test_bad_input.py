"""The catalogue of bad input: texts, places, and what contradicts what.

Each case ends with code 2 and one line on stderr that names the flag or the value and says what is valid; nothing is
made or changed on disk, and no training or sampling starts. A flag that takes a text needs a row below; what else can
be wrong with one flag is in test_bad_flags.py.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import main_mar
import sample
from scripts import (
    ablate_norms,
    bench,
    bench_attention,
    bench_ids,
    bench_loader,
    bench_scales,
    bench_training,
    cache_latents,
    cache_text,
    demo_shapes,
    demo_text,
    download_weights,
    export_weights,
    inspector,
    make_fid_stats,
    make_table,
    measure_latents,
    measure_reconstruction,
    plot_trace,
    plot_training,
    search_schedule,
    train_classifier,
    train_tokenizer,
)  # fmt: skip
from tests.helpers import blank_trace, shows, untrained
from tests.test_bad_flags import CONFIGS, flags_of, id_of
from tests.test_cli import TINY, files, refused
from util.checkpoint import FILE_NAME
from util.evaluation.fid_stats import FIDStats, save_fid_stats

HERE = "{tmp}/missing"
TRAIN = [*TINY]
DRAW = "--checkpoint {good} --output_dir {out}".split()
FOLDER = "--data imagefolder --tokenizer pixel --img_size 8 --batch_size 1 --data_path"
# of every program that reads a folder of images, on a run of digits
READING = [
    ("--split_dir Train", "--split_dir Train", "digits", "imagefolder"),
    ("--value_range 0,4095", "--value_range 0,4095", "digits", "imagefolder"),
    ("--no_exif", "--no_exif", "digits", "imagefolder"),
    ("--background black", "--background black", "digits", "imagefolder"),
    *((f"--value_range {text}", "--value_range", f"'{text}'") for text in ("5", "x,1", "3,1", "2,2", "nan,1", "0,inf")),
    *((f"--background {text}", "--background", f"'{text}'", "white") for text in ("blueish", "1,2", "1,2,256")),
    ("--data imagefolder --img_size 8 --data_path {splits}", "Train, Val", "--split_dir Train", "rename"),
    ("--data imagefolder --img_size 8 --data_path {splits} --split_dir x", "--split_dir x", "Train, Val"),
]
# flags after those of a run that would work -> what the line must say besides; {names}: see `places`
TRAINING = [
    *READING,
    ("--preset nope", "'nope'", "digits, mnist"),
    (
        "--tokenizer nope",
        "'nope'",
        "pixel, kl16, vq16, llamagen_vq16, llamagen_vq8, var_vq, var_vq_512",
        "diffusers:PATH_OR_REPO",
    ),
    ("--tokenizer diffusers:", "'diffusers:'", "diffusers:PATH_OR_REPO"),
    ("--tokenizer diffusers:{empty}", "{empty}", "config.json"),
    ("--tokenizer diffusers:{tmp}/missing", "{tmp}/missing", "OWNER/NAME"),
    ("--tokenizer kl16:x", "'kl16:x'"),
    ("--tokenizer vq16", "--vae_path"),
    ("--tokenizer kl16 --vae_stride 16 --vae_path {tmp}/missing", "{tmp}/missing", "--vae_path"),
    ("--tokenizer kl16 --vae_stride 16 --vae_path {file}", "{file}"),
    ("--tokenizer kl16 --vae_stride 16 --vae_path {empty}", "{empty}", "--vae_path"),
    ("--tokenizer pixel --vae_scale 2", "--vae_scale", "pixel"),
    ("--tokenizer pixel --vae_mean 0", "--vae_mean", "pixel"),
    ("--vae_stride 2", "--vae_stride 2", "has 1"),
    ("--vae_embed_dim 3", "--vae_embed_dim 3", "has 1"),
    ("--class_num 12", "--class_num 12", "10 classes"),
    ("--img_size 9", "9", "8"),
    ("--img_size 8x16", "--img_size 8x16", "--model mar_tiny", "square"),
    ("--buckets 8,8x16", "--buckets 8,8x16", "--model mar_tiny", "square"),
    *((f"--buckets {text}", "--buckets", f"'{text}'") for text in ("8", "8,8", "8,x", "8,1:0", "8,", "8x16x8,8")),
    ("--patch_size 3", "3", "multiple"),
    ("--batch_size 5000", "--batch_size", "5000", "1797"),
    ("--accum_iter 1000", "--batch_size", "1797"),
    ("--min_lr 3", "--min_lr 3", "at most the learning rate"),
    ("--start_epoch 1", "--start_epoch 1", "below --epochs 1"),
    ("--learn nope", "'nope'", "order, group, tau, cfg"),
    ("--learn order,", "''", "order, group, tau, cfg"),
    ("--learn profile", "'profile'", "order, group, tau, cfg"),
    ("--objective image", "--objective image", "--learn"),
    ("--objective image --learn order --order_base halton", "order", "--order_base random"),
    ("--objective image --learn order --no-adaptive", "order", "--no-adaptive"),
    ("--objective image --learn tau --no-freeze_backbone", "--objective image", "--freeze_backbone"),
    ("--objective image --learn tau --train_masks visited", "--train_masks visited", "--objective image"),
    ("--objective image --learn tau --reward digits", "'digits'", "two"),
    ("--objective image --learn tau --reward digits,nope", "'nope'", "pixels"),
    ("--objective image --learn tau --reward inception,pixels", "inception", "digits, cifar10"),
    ("--objective image --learn tau --reward_weights 1", "--reward_weights", "'1'", "digits,pixels"),
    ("--objective image --learn tau --reward_weights 1,x", "--reward_weights", "'1,x'", "digits,pixels"),
    ("--rho_min 0.9 --rho_max 0.1", "--rho_min 0.9", "--rho_max 0.1"),
    ("--tau_min 2", "--tau_min 2", "--tau_max 1.05"),
    ("--cfg_min 5 --learn cfg", "--cfg_min 5", "--cfg_max 4"),
    *(
        (f"--train_num_iter {text}", "--train_num_iter", f"'{text}'", "1 <= lo <= hi")
        for text in ("x", "0,3", "5,2", "4")
    ),
    ("--train_num_iter 1.5,2", "--train_num_iter", "'1.5,2'", "1 <= lo <= hi"),
    *(
        (f"--cfg_interval {text}", "--cfg_interval", f"'{text}'", "0 <= lo <= hi <= 1")
        for text in ("0.8,0.2", "x", "nan,1")
    ),
    ("--cfg_interval 0,2", "--cfg_interval", "'0,2'", "0 <= lo <= hi <= 1"),
    ("--cfg_t_interval 0.8,0.2", "--cfg_t_interval", "'0.8,0.2'", "0 <= lo <= hi <= 1"),
    ("--schedule {tmp}/missing", "--schedule", "{tmp}/missing", "No such file"),
    ("--schedule {file}", "--schedule", "{file}", "no JSON"),
    ("--group schedule", "--schedule FILE", "group"),
    ("--group staged --num_iter 2", "staged", "num_iter 2", "at least 3"),
    ("--group staged --num_iter 4 --train_masks visited --train_num_iter 2,4", "staged", "num_iter 2"),
    ("--objective image --learn group --group_base staged --train_num_iter 2,4", "staged", "num_iter 2", "at least 3"),
    ("--lr_schedule steep", "--lr_schedule", "'steep'", "constant, cosine, late_cosine"),
    ("--order_base nope", "'nope'", "random, raster, halton"),
    ("--group_base nope", "'nope'", "cosine, constant"),
    ("--group_base one", "'one'", "cosine, constant"),
    ("--order_base learned", "'learned'", "random, raster, halton"),
    ("--train_targets next", "--train_targets next", "--train_masks visited, policy or mix"),
    ("--mix_anneal 3", "--mix_anneal needs", "--train_masks visited, policy or mix"),
    ("--train_masks visited --order learned --learn order", "--order learned", "policy"),
    ("--infer_mode policy", "policy", "--learn order"),
    ("--order learned", "--order learned needs", "order head", "--learn order"),
    ("--tau_schedule learned", "--tau_schedule learned needs", "--learn tau"),
    ("--infer_mode policy --order learned", "infer_mode 'policy' needs", "--learn order"),
    ("--img_size 1000000", "'1000000'", "from 1 to 999999"),
    ("--freeze_backbone --no_train_diffloss", "--freeze_backbone --no-train_diffloss", "--learn"),
    ("--metrics nope", "'nope'", "fid, isc, kid, prc, sfid, none"),
    ("--metrics fid,,kid", "''", "fid, isc, kid, prc, sfid, none"),
    ("--features clip --metrics isc", "clip", "--metrics fid,kid,prc"),
    ("--online_eval --fid_stats {stats} --metrics kid", "kid", "--fid_stats", "--metrics fid,isc"),
    ("--online_eval --fid_stats {stats} --eval_split val", "--eval_split val", "--fid_stats"),
    ("--online_eval --eval_split val", "'val'", "'train'"),
    ("--online_eval --fid_stats {tmp}/missing", "{tmp}/missing", "--fid_stats"),
    ("--online_eval --judge {tmp}/missing", "{tmp}/missing", "--judge"),
    ("--lr_schedule fast", "'fast'", "cosine"),
    ("--online_eval --fid_stats {file}", "{file}", "mu and sigma"),
    ("--online_eval --fid_stats {wide}", "{wide}", "99 features", "64"),
    ("--online_eval --features inception --fid_weights {tmp}/missing", "{tmp}/missing", "--fid_weights"),
    ("--online_eval --features inception --fid_weights {file}", "{file}"),
    ("--online_eval --num_images 2", "2"),
    ("--use_cached", "--cached_path"),
    ("--use_cached --cached_path {tmp}/missing", "{tmp}/missing", "--cached_path"),
    ("--use_cached --cached_path {file}", "{file}", "--cached_path"),
    ("--use_cached --cached_path {empty}", "{empty}", "index.json"),
    ("--cached_text {empty}", "--cached_text {empty}", "--model mar_tiny"),
    ("--data_path {empty}", "--data_path {empty}", "digits"),
    (f"{FOLDER} {HERE}", HERE),
    (f"{FOLDER} {{file}}", "{file}"),
    (f"{FOLDER} {{empty}}", "{empty}", "<class>/*"),
    (f"{FOLDER} {{texts}}", "{texts}", "<class>/*"),
    (f"{FOLDER} {{classes}}", "{classes}", "<class>/*"),
    (f"{FOLDER} {{broken}}", "{broken}", "broken"),
    ("--resume {good} --diffloss_w 32", "{good}", "32"),
    ("--resume {good} --learn order", "{good}", "--learn", "--init_from"),
    ("--resume {truncated}", "{truncated}"),
    ("--resume {file}.pth", "{file}.pth"),
    ("--init_from {empty}", "{empty}"),
    ("--init_from {tmp}/missing", "{tmp}/missing"),
    ("--init_from {truncated}", "{truncated}"),
    ("--evaluate", "--evaluate", "--resume"),
    ("--keep_classes", "--keep_classes", "--init_from"),
    ("--evaluate --resume {empty}", "{empty}"),
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--output_dir {file}/below", "--output_dir", "{file}"),
    ("--output_dir {long}", "--output_dir", "name"),
    ("--output_dir /proc/x", "--output_dir /proc/x"),
    ("--log_dir {file}", "--log_dir {file}", "not a folder"),
    ("--log_dir /proc/x", "--log_dir /proc/x"),
    ("--device nope", "'nope'", "cpu"),
    ("--device cpu:x", "'cpu:x'", "cpu"),
    ("--device tpu", "'tpu'", "cpu"),
    ("--dtype int8", "--dtype", "int8"),  # for sampling only
    ("--dtype fp16 --device cpu", "fp16", "fp32, bf16"),
    ("--dist_on_itp", "--dist_on_itp", "OMPI_COMM_WORLD_RANK"),
    ("--nope 3", "--nope"),
    ("--batch 3", "--batch"),  # no abbreviations: a later flag would change what they mean
    ("stray", "stray"),
]
SAMPLING = [
    ("--checkpoint {tmp}/missing", "{tmp}/missing"),
    ("--checkpoint {empty}", "{empty}"),
    ("--checkpoint {file}.pth", "{file}.pth"),
    ("--checkpoint {truncated}", "{truncated}"),
    *(
        (f"--class_labels {text}", "--class_labels", f"'{text}'", "from -1 to 9")
        for text in ("10", "a,b", "-2", "3,,4", "-1,10")
    ),
    *((f"--class_labels={text}", "--class_labels", f"'{text}'", "from -1 to 9") for text in ("1.5", "nan", "0:9")),
    ("--prefix_from {tmp}/missing", "--prefix_from {tmp}/missing", "ids"),
    ("--prefix_share 0.5", "--prefix_share 0.5", "--prefix_from"),
    ("--prompts seven", "--prompts seven", "of classes", "--class_labels"),
    ("--text_encoder {empty}", "--text_encoder {empty}", "of classes"),
    ("--infer_mode policy", "policy", "--learn order"),
    ("--infer_mode baseline,policy", "policy", "--learn order"),
    ("--order_base nope", "'nope'", "random, raster, halton"),
    ("--group_base nope", "'nope'", "cosine, constant"),
    ("--cfg_interval 0.8,0.2", "--cfg_interval", "'0.8,0.2'", "0 <= lo <= hi <= 1"),
    ("--cfg_t_interval 0,2", "--cfg_t_interval", "'0,2'", "0 <= lo <= hi <= 1"),
    ("--schedule {results}", "--schedule", "{results}", "'values'"),
    ("--cfg_profile schedule", "--schedule FILE", "profile"),
    ("--group cosine,staged --num_iter 2", "staged", "num_iter 2", "at least 3"),
    ("--settings_of {tmp}/missing", "--settings_of", "{tmp}/missing"),
    ("--num_sampling_steps 100,5:", "'5:'", "between 1 and 1000"),
    ("--cfg 1,-2", "'-2'", "at least 0"),
    ("--cfg 1.5,1.50000001", "too close"),
    ("--num_images 5,6", "'5,6'", "at least 1"),
    ("--num_images 3", "3"),  # too few for the metrics
    ("--metrics fid,nope", "'nope'", "fid, isc, kid, prc, sfid, none"),
    ("--features inception --fid_weights {tmp}/missing", "{tmp}/missing", "--fid_weights"),
    ("--fid_stats {tmp}/missing", "{tmp}/missing", "--fid_stats"),
    (
        "--fid_stats {file}",
        "{file}",
        "mu and sigma, as scripts/make_fid_stats.py writes it (it is a file of another kind",
    ),
    ("--fid_stats {one}/0.png", "{one}/0.png", "mu and sigma, as scripts/make_fid_stats.py writes it (it is"),
    ("--fid_weights {file}", "{file}", "digits_classifier.npz (it is a file of another kind"),
    ("--features cifar10", "--features", "32"),
    ("--judge {tmp}/missing", "--judge {tmp}/missing", "inception, clip"),
    ("--judge cifar10", "--judge cifar10", "32"),
    ("--order learned", "--order learned needs", "--learn order"),
    ("--fid_stats {stats} --metrics prc", "prc", "--fid_stats"),
    ("--eval_split val", "'val'", "'train'"),
    ("--img_size 8x16", "--img_size 8x16", "which has 8"),
    ("--model mar_base", "--model mar_base", "encoder_depth 2"),
    ("--diffloss_w 32", "--diffloss_w 32", "16"),
    ("--diffloss_d 2", "--diffloss_d 2", "1"),
    ("--vae_path {tmp}/missing", "--vae_path", "pixel"),
    ("--data_path {empty}", "{empty}", "digits"),
    ("--edit_image {empty}", "--edit_mask"),
    ("--edit_mask {empty}", "--edit_image"),
    ("--edit_image {empty} --edit_mask {empty}", "--edit_image", "{empty}"),
    ("--device cuda:x", "cuda:x", "cpu"),
    ("--dtype fp16 --device cpu", "fp16", "fp32, bf16"),
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--output_dir /proc/x", "--output_dir /proc/x"),
    ("--nope 3", "--nope"),
]
CACHING = [
    *READING,
    ("--cached_path=", "--cached_path"),
    ("--cached_path {file}", "--cached_path {file}", "not a folder"),
    ("--cached_path {texts}", "{texts}", "not empty"),
    ("--cached_path /proc/x", "--cached_path /proc/x"),
    ("--verify --cached_path {tmp}/missing", "{tmp}/missing"),
    ("--verify --cached_path {empty}", "{empty}"),
    ("--tokenizer nope", "'nope'", "pixel, kl16, vq16"),
    ("--tokenizer kl16 --vae_path {tmp}/missing", "{tmp}/missing", "--vae_path"),
    ("--img_size 9", "9", "8"),
    ("--data canvases --img_size 8x8x8", "'8x8x8'", "256x384"),
    ("--data canvases --img_size 9x16", "9x16", "8, 8x16, 16x8"),
    ("--data canvases --buckets 8,9x16", "9x16", "8, 8x16, 16x8"),
    ("--data canvases --buckets 8,8x16", "--buckets 8,8x16", "--tokens discrete"),
    ("--buckets 8,1:1", "--buckets 1:1", "16x16"),
    ("--data imagefolder --data_path {one} --buckets 8,8x16", "8x16", "leave it out"),
    ("--vae_stride 2", "--vae_stride 2", "has 1"),
    ("--vae_embed_dim 3", "--vae_embed_dim 3", "has 1"),
    ("--data_path {empty}", "--data_path {empty}", "digits"),
    ("--device nope", "'nope'", "cpu"),
    ("--dist_on_itp", "--dist_on_itp", "OMPI_COMM_WORLD_RANK"),
]
TEXTS = [
    *READING,
    ("--text_encoder=", "--text_encoder", "empty text"),
    ("--cached_text=", "--cached_text", "empty text"),
    ("--cached_text {file}", "--cached_text {file}", "not a folder"),
    ("--cached_text /proc/x", "--cached_text /proc/x"),
    ("--captions beside", "--captions beside", "imagefolder"),
    ("--captions {tmp}/missing.csv", "{tmp}/missing.csv"),
    ("--captions {file}", "--captions {file}", ".csv, .jsonl or .txt"),
    ("--captions {texts}/a.txt --text_encoder {tmp}/missing", "--text_encoder {tmp}/missing", "model.safetensors"),
    ("--captions {texts}/a.txt", "--text_encoder {empty}", "T5"),
    ("--data imagefolder --data_path {texts}", "{texts}", "<class>/*"),
    ("--data imagefolder --data_path {one} --img_size 8", "--captions beside", "0.png"),
    ("--device nope", "'nope'", "cpu"),
]
DEMO = [
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--output_dir /proc/x", "--output_dir /proc/x"),
    ("--samples {tmp}/missing", "--samples", "{tmp}/missing"),
    ("--samples {empty}", "{empty}", "samples.npz"),
]
SHAPES = [
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--output_dir /proc/x", "--output_dir /proc/x"),
    ("--output_dir {empty} --tokenizer nope", "--output_dir {empty}", "samples_8x8", "one setting"),
]
STATISTICS = [
    *READING,
    ("--out x.txt", "--out", "x.txt", ".npz"),
    ("--out {file}/x.npz", "--out", "{file}"),
    ("--out /proc/x/y.npz", "--out /proc/x"),
    ("--img_size 9", "9", "8"),
    ("--split val", "'val'", "'train'"),
    ("--data imagefolder --data_path {tmp}/missing", "{tmp}/missing"),
    ("--data imagefolder --data_path {texts}", "{texts}", "<class>/*"),
    ("--data imagefolder --img_size 8", "data_path"),
    ("--data imagefolder --data_path {one} --img_size 8", "2 images"),
    ("--features clip --fid_weights {tmp}/missing", "{tmp}/missing", "--fid_weights"),
    ("--device nope", "'nope'", "cpu"),
]
RECONSTRUCTION = [
    *READING,
    ("--tokenizer nope", "'nope'", "pixel, kl16, vq16"),
    ("--tokenizer kl16 --vae_path {tmp}/missing", "{tmp}/missing", "--vae_path"),
    ("--img_size 9", "9", "8"),
    ("--num_images 1798", "--num_images 1798", "2 to 1797"),
    ("--split val", "'val'", "'train'"),
    ("--data imagefolder --data_path {empty}", "{empty}", "<class>/*"),
    ("--fid_stats {tmp}/missing", "{tmp}/missing", "--fid_stats"),
    ("--judge {tmp}/missing", "{tmp}/missing", "--judge"),
    ("--fid_stats {wide}", "{wide}", "99 features", "64"),
    ("--features clip --fid_weights {tmp}/missing", "{tmp}/missing", "--fid_weights"),
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--device nope", "'nope'", "cpu"),
]
MEASURING = [
    *READING,
    ("--tokenizer nope", "'nope'", "pixel, kl16, vq16"),
    ("--tokenizer kl16 --vae_path {tmp}/missing", "{tmp}/missing", "--vae_path"),
    ("--data imagefolder --data_path {tmp}/missing", "{tmp}/missing"),
    ("--img_size 9", "9", "8"),
    ("--device nope", "'nope'", "cpu"),
]
SEARCH = [
    ("--checkpoint {tmp}/missing", "{tmp}/missing"),
    ("--out {file}.png", "{file}.png", ".json"),
    ("--out {tmp}/results.json --features digits", "'digits'", "at least two", "pixels"),
    ("--features digits,nope", "'nope'", "pixels"),
    ("--reward_weights 1,2,3", "--reward_weights", "'1,2,3'", "digits,pixels"),
    ("--out /proc/x/y.json", "--out /proc/x"),
    ("--out {file}/y.json", "--out", "{file}"),
    ("--data_path {empty}", "{empty}", "digits"),
    ("--num_iter 65", "65", "64"),
    ("--device nope", "'nope'", "cpu"),
]
NORMS = [
    *READING,
    ("--tokenizer nope", "'nope'", "pixel, kl16, vq16"),
    ("--tokenizer pixel", "--tokenizer pixel", "continuous"),
    ("--tokenizer llamagen_vq16 --vae_path {tmp}/missing", "{tmp}/missing", "--vae_path"),
    ("--seeds 1,x", "--seeds", "'1,x'"),
    ("--img_size 9", "9", "8"),
    ("--data imagefolder --data_path {tmp}/missing", "{tmp}/missing"),
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--device nope", "'nope'", "cpu"),
]
AUTOENCODER = [
    *READING,
    ("--stride 16", "--stride 16", "8"),
    ("--width 6", "--width", "6", "multiple of 4"),
    ("--vq --multiscale", "--vq", "--multiscale"),
    ("--multiscale --patch_nums 1,2,2", "--patch_nums", "'1,2,2'", "above the last"),
    ("--multiscale --patch_nums 8", "--patch_nums", "'8'", "1,2,3,4"),
    ("--multiscale --patch_nums 1,2,3", "--patch_nums 1,2,3", "4", "--stride 2"),
    ("--epochs 0", "--epochs", "above 0"),
    ("--max_minutes 0", "--max_minutes", "above 0"),
    ("--batch_size 5000", "--batch_size", "5000"),
    ("--img_size 9", "9", "8"),
    ("--perceptual vgg16", "--perceptual_weights"),
    ("--perceptual vgg16 --perceptual_weights {tmp}/missing", "{tmp}/missing"),
    ("--perceptual digits --perceptual_weights x.pth", "--perceptual_weights x.pth", "digits"),
    ("--perceptual_weights x.pth", "--perceptual_weights x.pth", "none"),
    ("--features inception --fid_weights {tmp}/missing", "{tmp}/missing", "--fid_weights"),
    ("--features cifar10", "32"),  # of images of 8 pixels
    ("--data imagefolder --data_path {tmp}/missing", "{tmp}/missing"),
    ("--data imagefolder --data_path {one} --img_size 8", "1 images", "11"),
    ("--output_dir {file}", "--output_dir {file}", "not a folder"),
    ("--device nope", "'nope'", "cpu"),
]
CLASSIFIER = [
    ("--data_path {tmp}/missing --classifier cifar10", "{tmp}/missing"),
    ("--data_path {empty} --classifier cifar10", "{empty}"),
    ("--data_path {classes}", "{classes}"),
    ("--output {empty}", "--output", "{empty}"),
    ("--output {file}/x.npz", "--output", "{file}"),
    ("--output /proc/x/y.npz", "--output /proc/x"),
]
BENCH = [("--device nope", "'nope'", "cpu"), ("--only speed", "'speed'", "sampling, scaling, fast, training")]
BENCH_TRAINING = [
    ("--device nope", "'nope'", "cpu"),
    ("--only speed", "'speed'", "training, heads"),
    ("--trace {empty}", "--trace", "{empty}", ".json"),
    ("--trace {file}", "--trace", "{file}", ".json"),
    ("--trace {file}/x.json", "--trace", "{file}"),
]
BENCH_IDS = [
    ("--device nope", "'nope'", "cpu"),
    ("--only speed", "'speed'", "causal, mar, maskgil"),
    ("--models mar_base", "'mar_base'", "llamagen_ar_b"),
    ("--batch_sizes 1,0", "--batch_sizes", "'1,0'", "at least 1"),
    ("--img_size 100", "--img_size 100", "multiple of"),
]
BENCH_ATTENTION = [
    ("--device nope", "'nope'", "cpu"),
    ("--only speed", "'speed'", "whole, partial, training"),
    ("--kernels fast", "'fast'", "none, bool, cudnn, flex, nested"),
]
BENCH_SCALES = [("--device nope", "'nope'", "cpu"), ("--only speed", "'speed'", "sampling, training")]
BENCH_LOADER = [("--num_images 100", "--num_images 100", "64")]
EXPORT = [
    ("--checkpoint {tmp}/missing", "{tmp}/missing"),
    ("--checkpoint {empty}", "{empty}"),
    ("--checkpoint {truncated}", "{truncated}"),
    ("--output {tmp}/x.pth", "--output", "{tmp}/x.pth", ".safetensors"),
    ("--output {folder}.safetensors", "--output", "{folder}.safetensors"),
    ("--output {file}/x.safetensors", "--output", "{file}"),
    ("--output {file}.safetensors", "{file}.safetensors", "--force"),
    ("--output /proc/x/y.safetensors", "--output /proc/x"),
]
DOWNLOAD = [
    ("nope", "'nope'", "mar_base, mar_large, mar_huge, kl16"),
    ("--sha256 mar_base=12", "'mar_base=12'", "NAME=HEX"),
    ("--sha256 vae=" + "0" * 64, "NAME=HEX", "mar_base, mar_large, mar_huge, kl16"),
    ("--base_url nonsense", "--base_url", "'nonsense'", "http"),
    ("--out {file}", "--out {file}", "not a folder"),
    ("--out", "--out"),
    ("--nope", "--nope"),
]
TABLE = [
    ("{tmp}/missing", "{tmp}/missing"),
    ("{file}", "{file}"),
    ("{empty}", "{empty}"),
    ("{results} --metrics nope", "'nope'", "fid"),
    ("{results} --csv {tmp}/missing/t.csv", "{tmp}/missing"),
    ("{results} --plot {tmp}/missing/t.png", "{tmp}/missing"),
    ("{results} --plot {tmp}/t.png --x nope", "'nope'"),
    ("{results} --x cfg", "--plot"),
    ("{results} {results}", "one run"),
]
TRACE = [
    ("{file}", "--out"),
    ("{file} --out {out}", "{file}", "--save_trace"),
    ("{tmp}/missing --out {out}", "{tmp}/missing", "--save_trace"),
    ("{stats} --out {out}", "{stats}", "--save_trace"),
    ("{trace} --out {file}", "--out {file}", "not a folder"),
    ("{trace} --out /proc/x", "--out /proc/x"),
    *(
        (f"{{trace}} --out {{out}} --images={text}", "--images", f"'{text}'", "from 0 to 0")
        for text in ("1", "-1", "x", "0,,0")
    ),
]
CURVES = [
    ("{empty}", "--out"),
    ("{empty} --out {out}", "{empty}", "TensorBoard"),
    ("{tmp}/missing --out {out}", "{tmp}/missing", "TensorBoard"),
    ("{empty} --smooth 0 --out {out}", "--smooth", "at least 1"),
    ("{empty} --smooth x --out {out}", "--smooth", "'x'"),
    ("{empty} --out {empty}", "--out", "{empty}"),
    ("{empty} --out {file}/x.png", "--out", "{file}"),
]
INSPECTOR = [
    ("--checkpoint {tmp}/missing", "{tmp}/missing"),
    ("--checkpoint {file}", "{file}"),
    ("--port x", "--port", "'x'"),
    ("--port 65536", "--port", "65536", "from 0 to 65535"),
    ("--checkpoint {good} --host 256.0.0.1", "--host 256.0.0.1"),
    ("--checkpoint {good} --device nope", "'nope'"),
    ("--dtype int8", "--dtype", "'int8'"),
    ("--img_size 0", "--img_size", "'0'"),
    ("--diffloss_d x", "--diffloss_d", "'x'"),
    ("--diffloss_w 0", "--diffloss_w", "'0'"),
    ("--export {out}", "--export", "--trace"),
    ("--trace {file} --export {out}", "{file}", "--save_trace"),
    ("--trace {tmp}/missing", "{tmp}/missing", "--save_trace"),
    ("--trace {trace} --export {empty}", "--export {empty}", "folder"),
    ("--trace {trace} --export {trace}", "--export {trace}", "input"),
    ("--trace {trace} --export {file}", "--export {file}", "choose another name"),
]
DIGITS = "--data digits --tokenizer pixel --img_size 8"
STATS = "--data digits --features digits"
SMALL = "--data digits --stride 2 --latent_channels 2 --width 4 --output_dir {out}"
# program -> (flags of a run that would work, its cases)
CATALOGUE = {
    main_mar: (TRAIN, TRAINING),
    sample: (DRAW, SAMPLING),
    cache_latents: (f"{DIGITS} --num_workers 0 --cached_path {{out}}".split(), CACHING),
    cache_text: ("--data digits --text_encoder {empty} --cached_text {out}".split(), TEXTS),
    demo_shapes: ("--output_dir {out}".split(), SHAPES),
    demo_text: ("--output_dir {out}".split(), DEMO),
    make_fid_stats: (f"{STATS} --out {{out}}.npz".split(), STATISTICS),
    measure_reconstruction: (f"{DIGITS} --features digits --output_dir {{out}}".split(), RECONSTRUCTION),
    measure_latents: (f"{DIGITS} --num_workers 0".split(), MEASURING),
    train_tokenizer: (SMALL.split(), AUTOENCODER),
    ablate_norms: ("--data digits --tokenizer pixel --output_dir {out}".split(), NORMS),
    search_schedule: ("--checkpoint {good} --out {out}.json".split(), SEARCH),
    train_classifier: ("--epochs 1 --output {out}.npz".split(), CLASSIFIER),
    bench: ([], BENCH),
    bench_attention: ([], BENCH_ATTENTION),
    bench_ids: ([], BENCH_IDS),
    bench_scales: ([], BENCH_SCALES),
    bench_training: ([], BENCH_TRAINING),
    bench_loader: ([], BENCH_LOADER),
    export_weights: ("--checkpoint {good} --output {out}.safetensors".split(), EXPORT),
    download_weights: ("--base_url http://127.0.0.1:9 --out {out} mar_base".split(), DOWNLOAD),
    make_table: ([], TABLE),
    inspector: ("--port 0".split(), INSPECTOR),
    plot_trace: ([], TRACE),
    plot_training: ([], CURVES),
}
CASES = [(program, *case) for program, (_, cases) in CATALOGUE.items() for case in cases]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint."""
    return untrained(tmp_path_factory.mktemp("good"))


@pytest.fixture
def places(good, tmp_path):
    """The paths that the tables above name; `out` and `missing` are not there."""
    names = "out empty texts classes broken one splits file folder truncated stats wide trace results".split()
    paths = {name: tmp_path / name for name in names} | {"good": good, "tmp": tmp_path, "long": tmp_path / ("x" * 300)}
    for name in ("empty", "texts", "classes/a", "classes/b", "broken/a", "one", "folder.safetensors"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file", "file.pth", "file.safetensors", "texts/a.txt", "broken/a/0.png"):
        (tmp_path / name).write_text("this is no checkpoint, no picture and no array")
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "0.png")
    for name in ("Train", "Val"):
        shutil.copytree(tmp_path / "one", tmp_path / "splits" / name / "a")
    whole = (good / FILE_NAME).read_bytes()
    (tmp_path / "truncated").write_bytes(whole[: len(whole) // 2])
    for name, width in (("stats", 64), ("wide", 99)):
        save_fid_stats(paths[name], FIDStats(np.zeros(width), np.eye(width)))
    with open(paths["trace"], "wb") as file:
        np.savez(file, **blank_trace())
    row = dict(settings=dict(seed=0, cfg=1.0), metrics=dict(fid=1.0), weights="a", reference="b", images_per_second=1.0)
    paths["results"].write_text(json.dumps(row))
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.filterwarnings("ignore:broken image skipped", "ignore:class folders without")
@pytest.mark.parametrize("program, flags, shown", [(p, f, w) for p, f, *w in CASES], ids=id_of)
def test_what_cannot_be_is_one_line_before_anything_happens(
    program, flags, shown, places, tmp_path, monkeypatch, capsys
):
    for name in ("OMPI_COMM_WORLD_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("engine_mar.train_one_epoch", "sampling.run.generate", "scripts.train_tokenizer.train"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("it had started"))
    monkeypatch.setattr("scripts.train_classifier.train", lambda *a, **k: pytest.fail("it had started"))
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path) | files(places["good"])
    words = [*CATALOGUE[program][0], *flags.split()]
    line = refused(program.main, [word.format(**places) for word in words], capsys)
    shown = [word.format(**places).replace(str(tmp_path), "{tmp}") for word in shown]
    line = line.replace(str(tmp_path), "{tmp}")
    assert all(shows(line, word) for word in shown), line
    assert len(line) < 400 and files(tmp_path) | files(places["good"]) == before


def test_every_flag_that_takes_a_text_is_in_the_catalogue():
    """dist_url is read where a launcher is, resume and init_from also by name of the folder."""
    for program in CONFIGS:
        flags = " ".join(case[0] for case in CATALOGUE[program][1])
        texts = [
            name for name, (field, kind) in flags_of(program).items() if kind is str and not field.metadata["choices"]
        ]
        assert not [name for name in texts if f"--{name}" not in flags and name != "dist_url"], program


def test_the_catalogue_is_large():
    assert len(CASES) > 200
