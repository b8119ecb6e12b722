#!/usr/bin/env bash
# docs/leaderboard.md for digits: published rules, the best of a grid, checkerboard and staged groups, a searched schedule,
# and learned heads, at equal numbers of steps, on the reward's features and on a judge's.
#   BASE=output_dir/quickstart HEADS=output_dir/heads OUT=output_dir/leaderboard STEPS="4 8 16" bash scripts/leaderboard.sh
# HEADS is made by scripts/train_heads.sh where it is missing. SCHEDULE=FILE is a searched schedule (made if not given).
# Hand-made rules of up to 4 steps are chosen from the whole grid, of others from the small one (GRID=whole: from all).
# SEEDS are those of the images; 0 chooses. Several hours on 2 CPU cores; interrupted, the same command continues. Further
# arguments go to sample.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

base=${BASE:-output_dir/quickstart}
heads=${HEADS:-output_dir/heads}
out=${OUT:-output_dir/leaderboard}
schedule=${SCHEDULE:-$out/schedule.json}
read -ra numbers <<<"${STEPS:-4 8 16}"
budget=(--num_sampling_steps 8 --solver dpmpp_sde)
pass=() # --dry_run goes on to the scripts that this one calls
[ -z "$dry_run" ] || pass=(--dry_run)

[ -f "$heads/checkpoint-last.pth" ] || OUT=$heads bash scripts/train_heads.sh "${pass[@]}"
files=()
for number in "${numbers[@]}"; do
    grid=whole
    [ "$number" -le 4 ] || grid=small
    GRID=${GRID:-$grid} NUM_ITER=$number CHECKPOINT=$base OUT=$out/grid$number JUDGE=$out/judge.npz SEEDS=${SEEDS:-1,2,3} \
        bash scripts/search_grid.sh "${pass[@]}" "$@"
    files+=(--hand "$out/grid$number/judged/results.jsonl")
done
[ -n "${SCHEDULE:-}" ] || run python scripts/search_schedule.py --checkpoint "$base" --out "$schedule" --num_iter 4 \
    "${budget[@]}"

more=("$@")
row() { # FOLDER NAME CHECKPOINT flags: measured by both, a row of the table
    local folder=$1 name=$2 checkpoint=$3
    shift 3
    local images=(python sample.py --checkpoint "$checkpoint" --output_dir "$out/$folder" "${budget[@]}"
        --num_iter "$(IFS=,; echo "${numbers[*]}")" --num_images 1800 --metrics fid --features digits
        --seed "${SEEDS:-1,2,3}" "$@" "${more[@]}")
    run "${images[@]}"
    run "${images[@]}" --fid_weights "$out/judge.npz"
    files+=(--row "$name=$out/$folder/results.jsonl")
}
row published "published: linear cfg 1.5, tau 1" "$base" --infer_mode baseline --cfg 1.5 --temperature 1
row staged "checkerboard, staged" "$base" --infer_mode baseline --order checkerboard --group staged --cfg 1.8 \
    --temperature 0.9
row searched "searched schedule" "$base" --infer_mode baseline --schedule "$schedule"
row off "heads: tau and w of each step" "$heads" --infer_mode guidance --heads_adaptive off
row guidance "heads: tau and w of each image" "$heads" --infer_mode guidance
row staged_heads "heads: the same, staged groups" "$heads" --infer_mode guidance --group staged
row both "heads: order and groups too" "$heads" --infer_mode both
into "$out/leaderboard.md" python scripts/make_leaderboard.py --page "${files[@]}"
