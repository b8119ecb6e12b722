# Sourced by the paper_*.sh: the Python environment, the variables that all of them read, and their table and figure.
#   PRESET=imagenet|digits   ImageNet 256 as published, or the same experiment in small on scikit-learn's digits
#   OUT=DIR                  folder of all files (output_dir/<script>/<preset>); the same command continues a run
#   SEEDS=0,1,2              seeds to average over; NUM_IMAGES: images a figure; EPOCHS: of the digits
#   IMAGENET_PATH=DIR GPUS=N for ImageNet; the global batch is the published 2048 on any number of GPUs up to 32
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
        accum=$((gpus < 32 ? 32 / gpus : 1)) # of 64 images each
        ;;
    *) fail "unknown PRESET '$preset'; valid: digits, imagenet" ;;
esac

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
