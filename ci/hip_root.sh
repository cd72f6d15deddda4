#!/usr/bin/env bash
# Makes a root directory that holds AMD's HIP compiler, on a Debian machine without one:
#
#     ci/hip_root.sh DIR
#
# HIP 7.2 is in Debian's experimental suite. It cannot be installed next to an older libc, so it gets
# a small Debian of its own, into which ci/hip_run.sh and ci/hipcc change. Only compilers: nothing in
# it needs a GPU or a driver. About 1 GB and two minutes; a finished root is used again as it is.
set -euo pipefail

# Only HIP itself may come from experimental: the rest of that suite, libc included, is work in
# progress.
PINNED='hipcc hipcc-* rocm-device-libs-* libamdhip64-* libhiprtc* libamd-comgr* libhsa-runtime*'
INCLUDE=hipcc,libamdhip64-dev
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf '==> hip_root: %s\n' "$*"; }
die() {
  printf 'hip_root: %s\n' "$*" >&2
  exit 1
}

warn_of_fallback() {
  printf '%s\n' \
    '********************************************************************************' \
    'hip_root: WARNING: this root has hipcc 5.7 with clang 17 from trixie, because HIP 7 of' \
    'hip_root: WARNING: sid + experimental could not be installed. It knows only gfx906, gfx90a,' \
    'hip_root: WARNING: gfx942, gfx1030, gfx1100 and gfx1151.' \
    '********************************************************************************' >&2
}

[[ $# -eq 1 && $1 != -* ]] || die "expected one argument, the directory to make, got '$*'"
root=$(realpath -m "$1")
ready=$root/.hip-root-ready

if [[ -e $ready ]]; then
  say "$root is ready: $(<"$ready")"
  if [[ $(<"$ready") == *trixie ]]; then warn_of_fallback; fi
  exit 0
fi
[[ $(id -u) -eq 0 ]] || die "must run as root: it installs packages and changes into the new root"
[[ ! -e $root ]] || die "$root exists but was never finished; remove it first"

if ! command -v mmdebstrap >/dev/null; then
  say "installing mmdebstrap"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap
fi
[[ -e $KEYRING ]] || die "$KEYRING is missing; the package debian-archive-keyring has it"

# Whatever mirror this machine uses, the root uses too. apt knows it once it has fetched its lists.
mirror_address() {
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1
}
mirror=$(mirror_address)
if [[ -z $mirror ]]; then
  apt-get update -qq
  mirror=$(mirror_address)
fi
[[ -n $mirror ]] || die "apt must know a Debian mirror, got none"
mirror=${mirror%/} # a doubled slash in an address is an error to some mirrors

partial=$root.partial
mkdir -p "$(dirname "$root")" # mmdebstrap wants the folder to be there
scratch=$(mktemp -d)
trap 'rm -rf --one-file-system "$partial" "$scratch"' EXIT
preferences=$scratch/hip # apt passes over names with a dot

# bootstrap SUITES...: the first suite is the base, and packages of any other must be pinned.
bootstrap() {
  local sources=() suite
  for suite in "$@"; do
    sources+=("deb [signed-by=$KEYRING] $mirror $suite main")
  done
  rm -rf --one-file-system "$partial"
  # A mirror may be a copy of a past day, whose index says that it has expired. Its signature is
  # checked all the same.
  mmdebstrap --mode=root --variant=apt --include="$INCLUDE" \
    --aptopt='Acquire::Check-Valid-Until "false"' \
    --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --setup-hook='mkdir -p "$1/etc/apt/preferences.d"' \
    --setup-hook="copy-in $preferences /etc/apt/preferences.d" \
    "$1" "$partial" "${sources[@]}"
}

printf 'Package: %s\nPin: release a=experimental\nPin-Priority: 990\n' "$PINNED" >"$preferences"
chmod 644 "$preferences"
suites='sid + experimental'
say "HIP 7 from sid and experimental at $mirror, into $root"
if ! bootstrap sid experimental; then
  warn_of_fallback
  : >"$preferences"
  suites=trixie
  bootstrap trixie || die "trixie's HIP could not be installed either"
fi

version=$(chroot "$partial" dpkg-query --show --showformat '${Version}' hipcc)
if [[ -s $preferences ]] && dpkg --compare-versions "$version" lt 7.2; then
  die "hipcc $version was installed in place of experimental's 7.2 or newer"
fi
rm -rf "$partial"/var/cache/apt/archives/*.deb "$partial"/var/lib/apt/lists/*
printf 'hipcc %s of %s\n' "$version" "$suites" >"$partial/.hip-root-ready"
mv "$partial" "$root"
say "$root is ready: hipcc $version of $suites, $(du -sm "$root" | cut -f 1) MB, $SECONDS s"
