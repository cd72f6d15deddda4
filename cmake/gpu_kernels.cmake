# Compiles kernels/*.hip, one file per format and one for all of them, ahead of time and without a
# GPU: by hipcc for AMD, by nvcc for NVIDIA, each if it is there. csrc/gpu/runtime.cpp loads the
# results at run time.
#
# Sets CODE_OBJECTS to the files, and BUILT_FOR_HIP and BUILT_FOR_CUDA to the architectures in them,
# blank-separated.

set(TORCH_Q4_TORCH "" CACHE STRING "what the installed torch runs on: cpu, cuda or rocm")
set(TORCH_Q4_HIPCC "" CACHE FILEPATH "hipcc; empty: look for it")
set(TORCH_Q4_NVCC "" CACHE FILEPATH "nvcc; empty: look for it")
set(TORCH_Q4_ROCM_ARCH "" CACHE STRING "AMD architectures, or none; empty: those that users have")
set(TORCH_Q4_CUDA_ARCH "" CACHE STRING "NVIDIA ones, as in 80;90+PTX, or none; empty: likewise")
option(TORCH_Q4_FAST_COMPILE "compile NVIDIA's kernels in a third of the time, to slow code: for \
seeing that they compile" OFF)

set(CODE_OBJECTS "")
set(BUILT_FOR_HIP "")
set(BUILT_FOR_CUDA "")

set(DEFAULT_ROCM_ARCH gfx906 gfx908 gfx90a gfx942 gfx950 gfx1030 gfx1100 gfx1101 gfx1102 gfx1151
  gfx1200 gfx1201)
# Code for an x0 runs on every device of that generation; PTX is for generations to come. 90a is for
# Hopper's own matrix instructions; Hopper is all that there is of its generation.
set(DEFAULT_CUDA_ARCH 80 90a 100 120 80+PTX)

if(NOT TORCH_Q4_GPU MATCHES "^(auto|off)$")
  message(FATAL_ERROR "TORCH_Q4_GPU must be auto or off, got '${TORCH_Q4_GPU}'")
endif()

# The list in `value`, separated by semicolons, commas or blanks, or else `default`.
function(read_architectures result value default)
  string(REGEX REPLACE "[;, ]+" ";" list "${value}")
  if("${list}" STREQUAL "")
    set(list ${default})
  endif()
  set(${result} ${list} PARENT_SCOPE)
endfunction()

read_architectures(ROCM_ARCH "${TORCH_Q4_ROCM_ARCH}" "${DEFAULT_ROCM_ARCH}")
read_architectures(CUDA_ARCH "${TORCH_Q4_CUDA_ARCH}" "${DEFAULT_CUDA_ARCH}")

# The compiler that `given` names, or else the one that is found: where the environment says, on
# PATH, or in the usual place.
function(find_compiler result given name)
  if(NOT given)
    unset(FOUND_COMPILER CACHE)  # what an earlier build found may be gone
    find_program(FOUND_COMPILER ${name} ${ARGN} PATH_SUFFIXES bin)
    if(FOUND_COMPILER)
      set(given "${FOUND_COMPILER}")
    endif()
  endif()
  set(${result} "${given}" PARENT_SCOPE)
endfunction()

set(HIPCC "")
set(NVCC "")
if(TORCH_Q4_GPU STREQUAL "auto" AND NOT ROCM_ARCH STREQUAL "none")
  find_compiler(HIPCC "${TORCH_Q4_HIPCC}" hipcc HINTS ENV ROCM_PATH ENV ROCM_HOME PATHS /opt/rocm)
  if(NOT HIPCC AND TORCH_Q4_TORCH STREQUAL "rocm")
    message(FATAL_ERROR "torch is built for ROCm, but there is no hipcc to compile the GPU kernels "
      "with. Install it (Debian, Ubuntu: apt install hipcc; AMD's packages: rocm-hip-sdk), name it "
      "with TORCH_Q4_HIPCC=/path/to/hipcc, or build for the CPU only with TORCH_Q4_GPU=off.")
  endif()
endif()
if(TORCH_Q4_GPU STREQUAL "auto" AND NOT CUDA_ARCH STREQUAL "none")
  find_compiler(NVCC "${TORCH_Q4_NVCC}" nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda)
endif()

# Sources, and one name per format, from the list that everything else follows, too.
file(GLOB_RECURSE KERNEL_HEADERS CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/kernels/*.h")
set(REGISTRY "${CMAKE_CURRENT_SOURCE_DIR}/kernels/formats/registry.h")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${REGISTRY}")
file(READ "${REGISTRY}" FORMATS)
string(REGEX MATCHALL " X\\([A-Z0-9_]+\\)" FORMATS "${FORMATS}")
list(TRANSFORM FORMATS REPLACE " X\\(([A-Z0-9_]+)\\)" "\\1")
set(KERNEL_DIR "${CMAKE_CURRENT_SOURCE_DIR}/kernels")
set(OBJECT_DIR "${CMAKE_CURRENT_BINARY_DIR}/code_objects")
file(MAKE_DIRECTORY "${OBJECT_DIR}")

# One command per file, so that they run side by side.
function(compile_kernels suffix compiler flags)
  # Make does not compile anew when only a command changes; this file changes with it.
  set(stamp "${OBJECT_DIR}/${suffix}.flags")
  file(CONFIGURE OUTPUT "${stamp}" CONTENT "${compiler} ${flags}\n" @ONLY)
  foreach(name IN LISTS FORMATS ITEMS common)
    if(name STREQUAL "common")
      set(source "${KERNEL_DIR}/common.hip")
      set(definition "")
    else()
      set(source "${KERNEL_DIR}/format.hip")
      set(definition "-DTORCH_Q4_FORMAT=${name}")
      string(TOLOWER "${name}" name)
    endif()
    set(output "${OBJECT_DIR}/${name}.${suffix}")
    add_custom_command(OUTPUT "${output}"
      COMMAND ${compiler} ${flags} ${definition} -o "${output}" "${source}"
      DEPENDS "${source}" ${KERNEL_HEADERS} "${stamp}"
      COMMENT "GPU kernels: ${name}.${suffix}" VERBATIM)
    list(APPEND CODE_OBJECTS "${output}")
  endforeach()
  set(CODE_OBJECTS ${CODE_OBJECTS} PARENT_SCOPE)
endfunction()

if(HIPCC)
  list(JOIN ROCM_ARCH " " BUILT_FOR_HIP)
  # Neither compiler may fuse a multiplication and an addition on its own: dequantised values are
  # ggml's bit for bit. Kernels ask for fmaf where they want it. Format 2 of compressed code
  # objects is the one that ROCm 6 reads, too. Superword vectorisation would put what belongs to
  # different columns side by side, for instructions that most of these GPUs lack, and take twice
  # the registers for it.
  set(HIP_FLAGS -x hip --offload-device-only --gpu-bundle-output --offload-compress -O3 -std=c++17
    -ffp-contract=off -fno-slp-vectorize -Wno-unused-command-line-argument)
  foreach(arch IN LISTS ROCM_ARCH)
    list(APPEND HIP_FLAGS "--offload-arch=${arch}")
  endforeach()
  compile_kernels(hipfb "${CMAKE_COMMAND};-E;env;COMPRESSED_BUNDLE_FORMAT_VERSION=2;${HIPCC}"
    "${HIP_FLAGS}")
endif()

if(NVCC)
  # Its help names those with a letter, too, which --list-gpu-arch leaves out.
  execute_process(COMMAND "${NVCC}" --help OUTPUT_VARIABLE KNOWN_CUDA_ARCH ERROR_QUIET)
  set(CUDA_FLAGS -x cu -fatbin -O3 -std=c++17 --fmad=false)
  if(TORCH_Q4_FAST_COMPILE)
    list(APPEND CUDA_FLAGS --Ofast-compile=max)
  endif()
  foreach(arch IN LISTS CUDA_ARCH)
    string(REPLACE "." "" number "${arch}")
    string(REPLACE "+PTX" "" number "${number}")
    if(TORCH_Q4_CUDA_ARCH STREQUAL "" AND NOT KNOWN_CUDA_ARCH MATCHES "'compute_${number}'")
      message(STATUS "torch_q4: this nvcc does not know sm_${number}, which is left out")
      continue()
    endif()
    # "80+PTX" among the defaults is the PTX alone; of a list that is given, it is both, as
    # everywhere.
    if(NOT arch MATCHES "\\+PTX$" OR NOT "${number}" IN_LIST CUDA_ARCH)
      # Both kinds of Blackwell are made from one PTX, where both are asked for: the kernels have
      # nothing for one alone, and a compilation to PTX takes longer than that to machine code.
      set(virtual "${number}")
      if(number STREQUAL "120" AND "100" IN_LIST CUDA_ARCH)
        set(virtual 100)
      endif()
      list(APPEND CUDA_FLAGS -gencode "arch=compute_${virtual},code=sm_${number}")
      list(APPEND BUILT_FOR_CUDA "sm_${number}")
    endif()
    if(arch MATCHES "\\+PTX$")
      list(APPEND CUDA_FLAGS -gencode "arch=compute_${number},code=compute_${number}")
      list(APPEND BUILT_FOR_CUDA "compute_${number}")
    endif()
  endforeach()
  list(JOIN BUILT_FOR_CUDA " " BUILT_FOR_CUDA)
  compile_kernels(fatbin "${NVCC}" "${CUDA_FLAGS}")
endif()

if(HIPCC OR NVCC)
  foreach(vendor IN ITEMS AMD NVIDIA)
    set(architectures "${BUILT_FOR_HIP}")
    if(vendor STREQUAL "NVIDIA")
      set(architectures "${BUILT_FOR_CUDA}")
    endif()
    if(architectures)
      message(STATUS "torch_q4: GPU kernels for ${vendor}: ${architectures}")
    endif()
  endforeach()
  message(STATUS "torch_q4: they take minutes to compile. TORCH_Q4_ROCM_ARCH and TORCH_Q4_CUDA_ARCH "
    "choose fewer architectures or none, TORCH_Q4_GPU=off builds for the CPU only")
elseif(TORCH_Q4_GPU STREQUAL "off")
  message(STATUS "torch_q4: no GPU kernels, as TORCH_Q4_GPU=off says")
else()
  message(STATUS "torch_q4: no GPU kernels: found neither hipcc nor nvcc, or was told to use neither")
  if(TORCH_Q4_TORCH STREQUAL "cuda" AND NOT CUDA_ARCH STREQUAL "none")
    message(WARNING "torch is built for CUDA, but there is no nvcc to compile the GPU kernels with: "
      "torch_q4 will run on the CPU only. Install the CUDA toolkit or name its compiler with "
      "TORCH_Q4_NVCC=/path/to/nvcc.")
  endif()
endif()
