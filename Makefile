# ssm.c: `make` builds the trainer, `make test` proves it, `make help` lists the rest.
#
# Detection prints what was found and, for what was not, the fix. Variables to override: CC, CFLAGS, SANITIZE=1,
# NO_OPENMP=1.

CC ?= cc
CXX ?= c++
CFLAGS ?= -O3 -march=native
WARNINGS = -Wall -Wextra
BUILD = build
PKG_CONFIG ?= pkg-config

ifeq ($(SANITIZE),1)
  CFLAGS = -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
  BUILD = build/sanitize
endif

# --- detection
ifeq (,$(filter help clean,$(MAKECMDGOALS)))
  HASH := \#
  COMMA := ,
  try = $(shell printf '%b\n' '$(1)' | $(CC) -x c - $(2) -o /dev/null 2>/dev/null && echo yes)
  ifneq ($(shell $(PKG_CONFIG) --exists jansson 2>/dev/null && echo yes),yes)
    $(error Jansson (JSON) not found. On Debian or Ubuntu: sudo apt-get install gcc make pkg-config libjansson-dev libpcre2-dev libutf8proc-dev)
  endif
  ifneq ($(shell $(PKG_CONFIG) --exists libpcre2-8 2>/dev/null && echo yes),yes)
    $(error PCRE2 (regular expressions of tokenizers) not found. On Debian or Ubuntu: sudo apt-get install libpcre2-dev)
  endif
  ifneq ($(shell $(PKG_CONFIG) --exists libutf8proc 2>/dev/null && echo yes),yes)
    $(error utf8proc (Unicode normal form of tokenizers) not found. On Debian or Ubuntu: sudo apt-get install libutf8proc-dev)
  endif
  JANSSON_CFLAGS := $(shell $(PKG_CONFIG) --cflags jansson libpcre2-8 libutf8proc)
  JANSSON_LIBS := $(shell $(PKG_CONFIG) --libs jansson)
  TOKENIZER_LIBS := $(shell $(PKG_CONFIG) --libs libpcre2-8 libutf8proc)
  ifneq ($(call try,typedef float v __attribute__((vector_size(16)));int main(void){v a={0};a=__builtin_shufflevector(a$(COMMA)a$(COMMA)0$(COMMA)1$(COMMA)2$(COMMA)3);return (int)a[0];},),yes)
    $(error $(CC) does not compile __builtin_shufflevector: gcc 12 or newer, or clang, is needed; try make CC=clang)
  endif
  WARNINGS += $(if $(findstring clang,$(shell $(CC) --version)),-Wno-pass-failed)
  ifndef NO_OPENMP
    OPENMP := $(if $(call try,int main(void){return 0;},-fopenmp),-fopenmp)
  endif
  WARNINGS += $(if $(OPENMP),,-Wno-unknown-pragmas)
  # only the ladders and benchmarks in dev/ compare themselves with OpenBLAS
  ifneq (,$(filter dev $(BUILD)/dev/%,$(MAKECMDGOALS)))
    ifeq ($(call try,$(HASH)include <cblas.h>\nint main(void){openblas_set_num_threads(1);return 0;},-lopenblas),yes)
      DEV_FLAGS := -DUSE_OPENBLAS
      DEV_LIBS := -lopenblas
    endif
    $(info OpenBLAS: $(if $(DEV_LIBS),found,not found; the comparisons with it are left out. Fix: sudo apt-get install libopenblas-dev))
  endif
  $(info OpenMP:   $(if $(OPENMP),found,not used; one thread. Fix: gcc, or libomp-dev for clang))
endif

C_FLAGS = -std=gnu11 $(CFLAGS) $(WARNINGS) $(OPENMP) $(JANSSON_CFLAGS)
LIBS = $(JANSSON_LIBS) $(TOKENIZER_LIBS) -lm
SOURCES = train_mamba.c $(wildcard data/*.h)
TESTS = test_mamba.c $(wildcard dev/test/*.h)

.PHONY: fuzz sanitize-cuda readme ladders-readme cuda ladders all test test-cuda test-float test-double faults mutate mutate-all check-cxx dev clean help

all: $(BUILD)/train_mamba ## build the trainer (the default)

$(BUILD)/train_mamba: $(SOURCES) Makefile
	@mkdir -p $(BUILD)
	$(CC) $(C_FLAGS) train_mamba.c -o $@ $(LIBS)

$(BUILD)/test_mamba: $(TESTS) $(SOURCES) $(BUILD)/train_mamba Makefile
	@mkdir -p $(BUILD)
	$(CC) $(C_FLAGS) test_mamba.c -o $@ $(LIBS)

$(BUILD)/test_mamba_double: $(TESTS) $(SOURCES) $(BUILD)/train_mamba Makefile
	@mkdir -p $(BUILD)
	$(CC) $(C_FLAGS) -DREAL=double test_mamba.c -o $@ $(LIBS)

$(BUILD)/dev/cpu_%: dev/cpu/%.c $(SOURCES) Makefile
	@mkdir -p $(BUILD)/dev
	$(CC) $(C_FLAGS) $(DEV_FLAGS) $< -o $@ $(LIBS) $(DEV_LIBS)

$(BUILD)/dev/%: dev/bench/%.c $(SOURCES) Makefile
	@mkdir -p $(BUILD)/dev
	$(CC) $(C_FLAGS) $(DEV_FLAGS) $< -o $@ $(LIBS) $(DEV_LIBS)

# --- GPU: nvcc compiles for sm_80 and sm_90, and PTX for newer ones
NVCC ?= nvcc
# sm_90a: the instructions that only this generation has (wgmma, see 4.11 of train_mamba.cu)
ARCH ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90
HOST_FLAGS = $(CFLAGS) $(WARNINGS) $(OPENMP)
empty :=
space := $(empty) $(empty)
comma := ,
CUDA_FLAGS = -O3 -std=c++17 $(ARCH) -Xcompiler $(subst $(space),$(comma),$(strip $(HOST_FLAGS))) $(JANSSON_CFLAGS)
CUDA_LIBS = -cudart static -lcublasLt $(CUDA_JANSSON) $(CUDA_TOKENIZER) -lm
# CUDA_JANSSON=-l:libjansson.a CUDA_TOKENIZER='-l:libpcre2-8.a -l:libutf8proc.a' link them in, for a GPU machine
# without them
CUDA_JANSSON ?= $(JANSSON_LIBS)
CUDA_TOKENIZER ?= $(TOKENIZER_LIBS)

cuda: $(BUILD)/train_mambacu ## build the trainer for NVIDIA GPUs
$(BUILD)/train_mambacu: train_mamba.cu $(SOURCES) Makefile
	@mkdir -p $(BUILD)
	@command -v $(NVCC) >/dev/null || { echo "nvcc not found: install the CUDA toolkit 12 or newer, or give NVCC=/usr/local/cuda/bin/nvcc"; exit 1; }
	$(NVCC) $(CUDA_FLAGS) train_mamba.cu -o $@ $(CUDA_LIBS)

# the double oracle of the GPU tests; --wrap: calls that dev/test/test_cuda.h counts, or lets fail
CUDA_WRAPPED = cudaLaunchKernel cudaLaunchKernelExC __cudaGetKernel __cudaRegisterFunction cudaMalloc cudaDeviceGetAttribute
$(BUILD)/oracle.o: dev/test/oracle.cpp $(SOURCES) Makefile
	@mkdir -p $(BUILD)
	$(CXX) -std=c++17 $(CFLAGS) $(WARNINGS) $(OPENMP) $(JANSSON_CFLAGS) -c $< -o $@

$(BUILD)/test_mambacu: $(TESTS) train_mamba.cu $(SOURCES) $(BUILD)/oracle.o Makefile
	@command -v $(NVCC) >/dev/null || { echo "nvcc not found: install the CUDA toolkit 12 or newer, or give NVCC=/usr/local/cuda/bin/nvcc"; exit 1; }
	$(NVCC) -x cu $(CUDA_FLAGS) -c test_mamba.c -o $@.o
	$(NVCC) $(CUDA_FLAGS) $@.o $(BUILD)/oracle.o -Xlinker $(subst $(space),$(comma),$(addprefix --wrap=,$(CUDA_WRAPPED))) -o $@ $(CUDA_LIBS)

$(BUILD)/dev/%: dev/cuda/%.cu dev/cuda/ladder.h train_mamba.cu $(SOURCES) Makefile
	@mkdir -p $(BUILD)/dev
	$(NVCC) $(CUDA_FLAGS) $< -o $@ $(CUDA_LIBS)

test-cuda: $(BUILD)/train_mamba $(BUILD)/test_mambacu ## the suite compiled by nvcc, with the cases of the GPU (without one: the others)
	$(BUILD)/test_mambacu

# every kernel of ours at small ragged shapes under compute-sanitizer: `make -j4 sanitize-cuda` runs four of them at
# once. The program is one of its own, see SSM_SANITIZE
SANITIZED = $(foreach tool,memcheck initcheck synccheck racecheck,$(addprefix $(BUILD)/sanitized/$(tool)-, \
              layers scan ssd attention model generate))
sanitize-cuda: $(SANITIZED) ## memcheck, initcheck, synccheck and racecheck over the cases of the GPU
$(BUILD)/sanitizable/test_mambacu: $(TESTS) train_mamba.cu $(SOURCES) Makefile
	$(MAKE) BUILD=$(BUILD)/sanitizable ARCH="$(ARCH) -DSSM_SANITIZE" $@
$(SANITIZED): $(BUILD)/sanitized/%: $(BUILD)/sanitizable/test_mambacu
	@mkdir -p $(BUILD)/sanitized
	@SSM_TEST_SMALL=$(if $(findstring racecheck,$*),2,1) SSM_TEST_NO_GUARDS=1 compute-sanitizer \
	    --tool $(word 1,$(subst -, ,$*)) --error-exitcode 1 --show-backtrace no $(BUILD)/sanitizable/test_mambacu "cuda $(word 2,$(subst -, ,$*))" > $@.log 2>&1 \
	    && { echo "$*: $$(tail -n 1 $@.log)"; mv $@.log $@; } || { tail -n 30 $@.log; echo "$*: see $@.log"; exit 1; }

test: $(BUILD)/test_mamba $(BUILD)/test_mamba_double ## float and double test suites (SANITIZE=1: under sanitizers)
	$(BUILD)/test_mamba
	$(BUILD)/test_mamba_double

# changed inputs for the readers of files, under sanitizers: by clang's libFuzzer where there is one (make CC=clang),
# otherwise by the program's own changes. FUZZ_SECONDS for each reader
FUZZ_SECONDS ?= 20
FUZZ_FLAGS = -std=gnu11 -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=undefined \
             $(WARNINGS) -Wno-unknown-pragmas $(JANSSON_CFLAGS)
$(BUILD)/fuzz: dev/fuzz/fuzz.c $(SOURCES) Makefile
	@mkdir -p $(BUILD)
	$(CC) $(FUZZ_FLAGS) -fsanitize-coverage=trace-pc $< -o $@ $(LIBS)
$(BUILD)/libfuzzer: dev/fuzz/fuzz.c $(SOURCES) Makefile
	$(CC) $(FUZZ_FLAGS) -DLIBFUZZER -fsanitize=fuzzer $< -o $@ $(LIBS)

fuzz: $(BUILD)/fuzz $(if $(findstring clang,$(shell $(CC) --version)),$(BUILD)/libfuzzer) ## random changes of files for every reader: none may crash, hang or lie
	@cd $(BUILD) && for name in $$(./fuzz); do \
	    if test -x libfuzzer; then mkdir -p corpus/$$name && ./fuzz $$name 0 corpus/$$name && \
	        { FUZZ=$$name ./libfuzzer -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=2 corpus/$$name > $$name.log 2>&1 \
	          && echo "$$name: $$(tail -n 1 $$name.log)" || { tail -n 50 $$name.log; exit 1; }; }; \
	    else ./fuzz $$name $(FUZZ_SECONDS); fi || exit 1; done

faults: ## a save under kills, full disks, failing calls and power loss
	CC='$(CC)' dev/faults/run.sh
	dev/faults/convert.sh

mutate: ## plant bugs in the mathematics, a sample for five minutes: the tests must find 98 % of them
	python3 dev/mutate/mutate.py

mutate-all: ## all of them: hours
	python3 dev/mutate/mutate.py --all

check-cxx: ## the C file is also valid C++17 (what the CUDA build includes)
	$(CXX) -x c++ -std=c++17 -fsyntax-only $(WARNINGS) $(OPENMP) $(JANSSON_CFLAGS) train_mamba.c

# the ladders of GPU kernels need nvcc; without it the others are built
CUDA_LADDERS = $(patsubst dev/cuda/%.cu,$(BUILD)/dev/%,$(wildcard dev/cuda/*.cu))
dev: $(patsubst dev/cpu/%.c,$(BUILD)/dev/cpu_%,$(wildcard dev/cpu/*.c)) $(patsubst dev/bench/%.c,$(BUILD)/dev/%,$(wildcard dev/bench/*.c)) $(if $(shell command -v $(NVCC)),$(CUDA_LADDERS)) ## kernel ladders and benchmarks

ladders: $(CUDA_LADDERS) ## the table of all GPU kernels, on the GPU of this machine
	@date +%F; for ladder in $^; do ./$$ladder || exit 1; done

ladders-readme: ## write build/ladders.txt, what `make ladders` printed, into dev/README.md
	@test -s $(BUILD)/ladders.txt || { echo "run make ladders > $(BUILD)/ladders.txt first, on a GPU"; exit 1; }
	@{ sed '/<!-- ladders: begin/q' dev/README.md; echo '```'; sed '/^OpenMP/d;/^OpenBLAS/d' $(BUILD)/ladders.txt; echo '```'; sed -n '/<!-- ladders: end/,$$p' dev/README.md; } > $(BUILD)/README.md
	@mv $(BUILD)/README.md dev/README.md

readme: all ## write the table of options into README.md
	@{ sed '/<!-- options: begin/q' README.md; $(BUILD)/train_mamba --help=markdown; sed -n '/<!-- options: end/,$$p' README.md; } > $(BUILD)/README.md
	@mv $(BUILD)/README.md README.md

clean: ## remove build/
	rm -rf build

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
