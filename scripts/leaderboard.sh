#!/usr/bin/env bash
# The first part of docs/leaderboard.md, on digits: published rules, the best of a grid, checkerboard and staged groups, a
# searched schedule, and learned heads, at equal numbers of steps, on the reward's features and on a judge's.
#   BASE=output_dir/quickstart HEADS=output_dir/heads OUT=output_dir/leaderboard STEPS="4 8 16" bash scripts/leaderboard.sh
# SEEDS (1,2,3): those of the images, and of the heads, which scripts/train_heads.sh trains in HEADS/seedN, and those of
# each step alone, without an adaptive part, in HEADS/stepsN; their images have the seed of their training. SCHEDULE=FILE is a
# searched schedule (made if not given, on images of other seeds).
# Seed 0 chooses among the 64 hand-made rules of GRID=small, or with GRID=whole among all 152 of scripts/search_grid.sh.
# Several hours on 2 CPU cores; interrupted, the same command continues. Further arguments go to sample.py.
#   PRESET=cifar10 BASE=output_dir/cifar10_small DATA="--data_path data" bash scripts/leaderboard.sh
# CIFAR-10 at 8 steps of 10, on a GPU, on a base of --preset cifar10_small, with ImageNet's features as judge.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

preset=${PRESET:-digits}
heads=${HEADS:-$(out_of heads "$preset")}
out=${OUT:-$(out_of leaderboard "$preset")}
case $preset in
    digits) base=${BASE:-output_dir/quickstart} judge=$out/judge.npz numbers=${STEPS:-4 8 16} steps=8 count=1800 ;;
    cifar10) base=${BASE:-output_dir/cifar10_small} judge=efficientnet_lite0 numbers=${STEPS:-8} steps=10 count=5000 ;;
    *) fail "unknown PRESET '$preset'; valid: digits, cifar10" ;;
esac
schedule=${SCHEDULE:-$out/schedule.json}
IFS=, read -ra seeds <<<"${SEEDS:-1,2,3}"
read -ra numbers <<<"$numbers"
read -ra data <<<"${DATA:-}"
budget=(--num_sampling_steps $steps --solver dpmpp_sde)
pass=() # --dry_run goes on to the scripts that this one calls
[ -z "$dry_run" ] || pass=(--dry_run)

for seed in "${seeds[@]}"; do
    BASE=${BASE:-} SEED=$seed OUT=$heads/seed$seed bash scripts/train_heads.sh "${pass[@]}"
    BASE=${BASE:-} SEED=$seed OUT=$heads/steps$seed bash scripts/train_heads.sh "${pass[@]}" --no-adaptive \
        --learn tau,cfg,profile --group staged
done
files=()
for number in "${numbers[@]}"; do
    GRID=${GRID:-small} NUM_ITER=$number STEPS=$steps CHECKPOINT=$base OUT=$out/grid$number JUDGE=$judge \
        SEEDS=${SEEDS:-1,2,3} bash scripts/search_grid.sh "${pass[@]}" "$@"
    files+=(--hand "$out/grid$number/judged/results.jsonl")
done
[ -n "${SCHEDULE:-}" ] || run python scripts/search_schedule.py --checkpoint "$base" "${data[@]}" --out "$schedule" \
    --num_iter "${numbers[0]}" "${budget[@]}" --features "$preset,pixels" --reward_weights 1,3 --seed 100

more=("$@")
measure() { # FOLDER CHECKPOINT SEEDS flags
    run python sample.py --checkpoint "$2" --output_dir "$out/$1" "${data[@]}" "${budget[@]}" --seed "$3" \
        --num_iter "$(IFS=,; echo "${numbers[*]}")" --num_images $count --metrics fid --features "$preset" \
        --judge "$judge" "${@:4}" "${more[@]}"
}
by_hand() { # FOLDER NAME flags: a row of the table, on the base
    measure "$1" "$base" "$(IFS=,; echo "${seeds[*]}")" --infer_mode baseline "${@:3}"
    files+=(--row "$2=$out/$1/results.jsonl")
}
by_heads() { # FOLDER NAME CHECKPOINTS flags: a row of the table, over the seeds of training
    local seed
    for seed in "${seeds[@]}"; do
        measure "$1" "$heads/$3$seed" "$seed" "${@:4}"
    done
    files+=(--row "$2=$out/$1/results.jsonl")
}
by_hand published "published: linear cfg 1.5, tau 1" --cfg 1.5 --temperature 1
by_hand staged "checkerboard, staged" --order checkerboard --group staged --cfg 1.8 --temperature 0.9
by_hand searched "searched schedule" --schedule "$schedule"
by_heads steps "heads: tau and w of each step" steps --infer_mode guidance --group staged
by_heads off "heads: tau and w of each image, that part off" seed --infer_mode guidance --group staged --heads_adaptive off
by_heads guidance "heads: tau and w of each image" seed --infer_mode guidance --group staged
by_heads both "heads: order and groups too" seed --infer_mode both
page=(--page frozen)
[ "$preset" = digits ] || page=()
into "$out/leaderboard.md" python scripts/make_leaderboard.py "${page[@]}" "${files[@]}"
