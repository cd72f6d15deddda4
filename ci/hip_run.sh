#!/usr/bin/env bash
# Runs a command inside a root made by hip_root.sh:
#
#     ci/hip_run.sh ROOT COMMAND...
#
# The source tree, the current directory, the temporary directory and the paths in HIP_BIND
# (separated by colons) are visible inside at their own absolute paths, so that paths in arguments,
# messages and dependency files mean the same on both sides. The exit status is the command's.
set -euo pipefail

die() {
  printf 'hip_run: %s\n' "$*" >&2
  exit 125
}

# bind ROOT PATH: makes PATH visible inside ROOT.
bind() {
  local inside=$1$2
  [[ -d $2 ]] || die "HIP_BIND and the directories used must be directories, got '$2'"
  [[ ! $2 -ef $inside ]] || return 0 # lies in a directory that is bound already
  mkdir -p "$inside"
  [[ -z $(ls -A "$inside") ]] || die "$2 cannot be seen inside: the root has files of its own there"
  mount --bind "$2" "$inside"
}

[[ $# -ge 2 ]] || die "expected ROOT COMMAND..., got '$*'"

if [[ $1 != --inside ]]; then
  root=$(realpath -m "$1")
  [[ -e $root/.hip-root-ready ]] || die "$root is no finished root; make it with ci/hip_root.sh"
  # A mount namespace of its own: the mounts vanish with the command, however it ends.
  options=(--mount)
  [[ $(id -u) -eq 0 ]] || options+=(--map-root-user)
  exec unshare "${options[@]}" -- "$(realpath "$0")" --inside "$root" "${@:2}"
fi

root=$2
shift 2
mount --rbind /proc "$root/proc" # hipcc finds its own files through it
mount --rbind /dev "$root/dev"
bind "$root" "$(realpath "${TMPDIR:-/tmp}")"
bind "$root" "$(realpath "$(dirname "$0")/..")"
IFS=: read -r -a extra <<<"${HIP_BIND:-}"
for path in "${extra[@]}" "$PWD"; do
  [[ -z $path || $path == / ]] || bind "$root" "$(realpath "$path")"
done

# Programs of the host would run against the wrong libc, and its HIP installation, if there is one,
# is not this one. LLVM's tools lie in a directory with a version in its name.
tools=$(cd "$root" && echo usr/lib/llvm-*/bin)
exec chroot "$root" /usr/bin/env --chdir="$PWD" \
  --unset=LD_LIBRARY_PATH --unset=LD_PRELOAD --unset=PYTHONPATH --unset=PYTHONHOME \
  --unset=HIP_PATH --unset=ROCM_PATH --unset=HIP_DEVICE_LIB_PATH --unset=HIP_CLANG_PATH \
  PATH="/usr/sbin:/usr/bin:/sbin:/bin:/$tools" LC_ALL=C.UTF-8 "$@"
