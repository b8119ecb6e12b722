#!/usr/bin/env bash
# Heads that win: train all heads by --objective image on a frozen base, one set for 4 to 8 steps of 8 diffusion steps.
#   BASE=output_dir/quickstart OUT=output_dir/heads bash scripts/train_heads.sh
# Without BASE the quickstart's base is made if it is missing. About 40 minutes of one CPU core; interrupted, the same
# command continues. SEED as well; further arguments go to main_mar.py, where the last one counts. What the heads are
# worth: scripts/leaderboard.sh.
#   PRESET=cifar10 BASE=output_dir/cifar10_small DATA="--data_path data" bash scripts/train_heads.sh
# CIFAR-10, on a GPU: for 8 steps of 10, on a base of --preset cifar10_small. These settings have not been tried.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

preset=${PRESET:-digits}
out=${OUT:-$(out_of heads "$preset")}
case $preset in
    digits)
        base=${BASE:-output_dir/quickstart}
        model=(--preset digits)
        budget=(--train_num_iter 4,8 --num_iter 4 --num_sampling_steps 8 --cfg 1.8 --temperature 0.9 --no-grad_checkpointing)
        reward=(--reward digits,pixels --reward_weights 1,3 --bank 1024 --epochs 45)
        ;;
    cifar10)
        base=${BASE:-output_dir/cifar10_small}
        model=(--preset cifar10_small)
        budget=(--train_num_iter 8,8 --num_iter 8 --num_sampling_steps 10 --cfg 2 --temperature 0.95)
        reward=(--reward cifar10,pixels --reward_weights 1,3 --bank 2048 --epochs 2)
        ;;
    *) fail "unknown PRESET '$preset'; valid: digits, cifar10" ;;
esac
read -ra data <<<"${DATA:-}"
model+=("${data[@]}")
if [[ -z ${BASE:-} ]]; then
    run python main_mar.py "${model[@]}" --output_dir "$base" --resume "$base"
fi
run python main_mar.py "${model[@]}" --init_from "$base" --objective image --learn order,group,tau,cfg,profile \
    --group_base staged "${budget[@]}" --solver dpmpp_sde "${reward[@]}" --lr 1.6e-2 --adaptive_lr 0.03 --eval_freq 1000 \
    --seed "${SEED:-1}" --output_dir "$out" --resume "$out" "$@"
