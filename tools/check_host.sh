#!/bin/sh
# Before `make install` starts: is this Python one we support, and what will torch cost?
python=$1
venv=$2
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
  echo "onelaunch: '$python' does not run; name a Python 3.11, 3.12 or 3.13: make PYTHON=python3.12" >&2
  exit 1
}
case $version in
  3.11 | 3.12 | 3.13) ;;
  *)
    echo "onelaunch: '$python' is Python $version; name a 3.11, 3.12 or 3.13: make PYTHON=python3.12" >&2
    exit 1
    ;;
esac
"$venv/bin/python" -c 'import torch' 2>/dev/null && exit 0
if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && ! command -v nvidia-smi >/dev/null 2>&1 &&
  [ ! -e /proc/driver/nvidia/version ]; then
  echo "No NVIDIA driver was found here. pip brings torch's CUDA build all the same: a download of"
  echo "2.7 GB, 5 GB on disk. With PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS pointing at PyTorch's CPU"
  echo "wheels it is 0.2 GB. Going on as it is."
fi
exit 0
