# Sourced by the paper_*.sh: the Python environment, the variables that all of them read, and their table and figure.
#   PRESET=imagenet|digits   ImageNet 256 as published, or the same experiment in small on scikit-learn's digits
#   OUT=DIR                  folder of all files (output_dir/<script>/<preset>); the same command continues a run
#   SEEDS=0,1,2              seeds to average over; NUM_IMAGES: images a figure; EPOCHS: of the digits
#   IMAGENET_PATH=DIR GPUS=N for ImageNet; in training N must divide the published batch
# With --dry_run they show their commands and stop.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

preset=${PRESET:-imagenet}
out=${OUT:-output_dir/$(basename "$0" .sh)/$preset}
case $preset in
    digits)
        seeds=${SEEDS:-0,1,2} num_images=${NUM_IMAGES:-600} epochs=${EPOCHS:-45}
        ;;
    imagenet)
        seeds=${SEEDS:-0} num_images=${NUM_IMAGES:-50000} data=${IMAGENET_PATH:-data/imagenet}
        gpus=$(num_gpus)
        ;;
    *) fail "unknown PRESET '$preset'; valid: digits, imagenet" ;;
esac

# share_batch IMAGES MOST: what a GPU has of a published batch, as `accum` parts of `batch` images, at most MOST each.
share_batch() {
    local share=$(($1 / gpus)) number valid=()
    for ((number = 1; number <= 64; number++)); do
        (($1 % number)) || valid+=("$number")
    done
    ((share > 0 && $1 % gpus == 0)) ||
        fail "GPUS must divide the published batch of $1 images, got $gpus; valid up to 64: ${valid[*]}"
    accum=$(((share + $2 - 1) / $2))
    while ((share % accum)); do accum=$((accum + 1)); done
    batch=$((share / accum))
}

# The guidance scale of a published model.
cfg_of() {
    case $1 in
        mar_base) echo 2.9 ;;  # published: FID 2.31, IS 281.7; FID 3.48 without guidance
        mar_large) echo 3.0 ;; # published: FID 1.78, IS 296.0
        mar_huge) echo 3.2 ;;  # published: FID 1.55, IS 303.7
        *) fail "unknown model '$1'; valid: mar_base, mar_large, mar_huge" ;;
    esac
}

# Arguments: those of make_table.py, the results first.
finish() {
    into "$out/table.md" python scripts/make_table.py "$@" --csv "$out/table.csv" --plot "$out/figure.png"
    say "table: $out/table.md and table.csv, figure: $out/figure.png"
}
