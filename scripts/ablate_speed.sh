#!/usr/bin/env bash
# The quality of images with each lever that makes sampling faster: one added after the other, then the feature cache
# and the number of diffusion steps by themselves, 3 sampling seeds, as a table and a plot.
#   CHECKPOINT=output_dir/quickstart OUT=output_dir/speed bash scripts/ablate_speed.sh
# Digits by default: 1,800 images a setting, 16 steps, cfg 1.5; about 50 minutes on 2 CPU cores.
# SAMPLING has the flags for another checkpoint: SAMPLING="--num_iter 64 --cfg 2.9 --num_images 50000".
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=${OUT:-output_dir/speed}
read -ra sampling <<<"${SAMPLING:---num_iter 16 --cfg 1.5 --num_images 1800}"
sweep() { # TABLE [flags of sample.py]
    local table=$1
    shift
    run python sample.py --checkpoint "${CHECKPOINT:-output_dir/quickstart}" --output_dir "$out/$table" "${sampling[@]}" \
        --seed 0,1,2 --metrics fid,isc "$@"
}

published=(--solver ddpm --num_sampling_steps 100)
fast=(--fast --dtype fp32) # the dtypes have rows of their own
sweep levers --dtype fp32 "${published[@]}"
sweep levers --dtype bf16 "${published[@]}"
sweep levers --dtype int8 --device cpu "${published[@]}"
sweep levers "${fast[@]}" --num_sampling_steps 12 --refresh_every 1
sweep levers "${fast[@]}" --refresh_every 1
sweep levers "${fast[@]}"
sweep levers --fast --dtype bf16
sweep levers --fast --dtype int8 --device cpu
sweep cache "${fast[@]}" --refresh_every 1,2,3,4,6,8,16
sweep annealing "${fast[@]}" --num_sampling_steps 12,12:6,12:5,12:4,10:5
sweep solvers --dtype fp32 --solver ddpm,ddim,dpmpp,dpmpp_sde --num_sampling_steps 8,12,25
for table in levers cache annealing solvers; do
    into "$out/$table.md" python scripts/make_table.py "$out/$table/results.jsonl" --csv "$out/$table.csv"
done
run python scripts/make_table.py "$out"/*/results.jsonl --plot "$out/fid_by_evals.png" >/dev/null
say "tables: $out/levers.md, cache.md, annealing.md, solvers.md, plot: $out/fid_by_evals.png"
