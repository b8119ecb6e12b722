#!/usr/bin/env bash
# Heads that win: train all heads by --objective image on a frozen base, one set for 4 to 8 steps of 8 diffusion steps.
#   BASE=output_dir/quickstart OUT=output_dir/heads bash scripts/train_heads.sh
# Without BASE the quickstart's base is made if it is missing. About 40 minutes of one CPU core; interrupted, the same
# command continues. SEED as well; further arguments go to main_mar.py, where the last one counts. What the heads are
# worth: scripts/leaderboard.sh.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

base=${BASE:-output_dir/quickstart}
out=${OUT:-output_dir/heads}
if [[ -z ${BASE:-} ]]; then
    run python main_mar.py --preset digits --output_dir "$base" --resume "$base"
fi
run python main_mar.py --preset digits --init_from "$base" --objective image --learn order,group,tau,cfg,profile \
    --group_base staged --train_num_iter 4,8 --num_iter 4 --num_sampling_steps 8 --solver dpmpp_sde --cfg 1.8 --temperature 0.9 \
    --reward digits,pixels --reward_weights 1,3 --bank 1024 --lr 1.6e-2 --adaptive_lr 0.03 --epochs 45 \
    --no-grad_checkpointing --eval_freq 1000 --seed "${SEED:-1}" --output_dir "$out" --resume "$out" "$@"
