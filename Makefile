# vmig: `make help` lists what can be made.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

CARGO ?= cargo
RUSTC ?= rustc
CFLAGS ?= -O2 -g
INSTALL ?= install
OBJCOPY ?= objcopy
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
BINDIR ?= $(PREFIX)/bin
MANDIR ?= $(PREFIX)/share/man
DESTDIR ?=
export CARGO_TARGET_DIR ?= $(CURDIR)/target
override TARGET := $(abspath $(CARGO_TARGET_DIR))

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME := libvmig.so.$(firstword $(subst ., ,$(VERSION)))
# What the archive needs beside what a C compiler passes by itself (libgcc, libc); tests/install.rs asks rustc.
LIBS_PRIVATE := -lutil -lrt -lpthread -lm -ldl

LIB := $(TARGET)/lib/libvmig.a
LIB_FAULT := $(TARGET)/fault/lib/libvmig.a
SHARED := $(TARGET)/release/libvmig.so
TOOL := $(TARGET)/tool/release/vmig
MAN := $(TARGET)/man
MAN_TEXTS := include/vmig.h docs/options.md docs/tool.md README.md
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
WARN := -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Werror
# Programs of the tests, each one file; header_*.c are compiled by tests/header.rs in its own ways.
C_TESTS := $(filter-out header_%,$(patsubst tests/c/%.c,%,$(wildcard tests/c/*.c)))
C_SOURCES := include/vmig.h $(wildcard c-examples/*.[ch] c-examples/*/*.* c-examples/*/Makefile c-examples/*/*/* tests/c/*.[ch])
# Functions whose callers inside the library are led through tests/c/doors in `make c-fault`.
DOORS := accept4 bind connect eventfd fchmod fcntl fstat fstat64 fstatfs ftruncate64 getsockname getsockopt ioctl listen \
    lseek lseek64 lstat64 madvise memfd_create mmap mmap64 mprotect open open64 pipe2 poll posix_spawn \
    posix_spawn_file_actions_addclosefrom_np posix_spawn_file_actions_adddup2 posix_spawn_file_actions_init pread64 \
    pthread_create read readlink readv recv recvmsg sendmsg setsockopt socket stat64 statx syscall waitid write writev
DOORS_OBJ := $(TARGET)/fault/doors.o
# The programs `make demo` runs; nothing else is built into these directories.
C := $(TARGET)/c
C_ASAN := $(TARGET)/c-asan
C_FAULT := $(TARGET)/c-fault

.PHONY: build man c c-asan c-fault check check-all demo bench header install uninstall fmt lint doc clean help FORCE

## build: the release libraries, static and shared, the tool vmig and the man pages (the default)
build: $(LIB) $(TOOL) man

# In a directory of its own: it needs the rlib, with which cargo would write other libraries over those below.
$(TOOL): FORCE
	$(CARGO) build --locked --bin vmig --release --target-dir $(TARGET)/tool

# Without the rlib, for where one is made cargo does no link-time optimisation. CARGO_LIB's output: what rustc's archive
# needs from the system, which tests/install.rs compares with LIBS_PRIVATE.
CARGO_LIB = $(CARGO) rustc --locked --lib --release --crate-type staticlib,cdylib
$(TARGET)/release/libvmig.a: FORCE
	$(CARGO_LIB) -- --print native-static-libs=$(TARGET)/native-static-libs.txt
$(TARGET)/fault/release/libvmig.a: FORCE
	$(CARGO_LIB) --features fault-injection --target-dir $(TARGET)/fault

# One object in which only our names are global: else Rust's standard library in our archive collides with the one in
# another Rust archive of the same program ("multiple definition of rust_eh_personality").
$(LIB) $(LIB_FAULT): %/lib/libvmig.a: %/release/libvmig.a Makefile
	mkdir -p $(@D)
	nm -D --defined-only $(<:.a=.so) | awk '{ print "--undefined=" $$3 }' >$(@D)/exports
	$(LD) -r --force-group-allocation @$(@D)/exports -o $(@D)/vmig.o $<
	$(OBJCOPY) --remove-section=.llvmbc --remove-section=.llvmcmd $(@D)/vmig.o
	$(OBJCOPY) --wildcard --keep-global-symbol='vmig_*' $(REDIRECT) $(@D)/vmig.o
	rm -f $@
	$(AR) rcs $@ $(@D)/vmig.o

$(LIB_FAULT): REDIRECT = $(foreach f,$(DOORS),--redefine-sym $(f)=door_$(f))
$(DOORS_OBJ): tests/c/doors/doors.c Makefile
	mkdir -p $(@D)
	$(CC) $(WARN) $(CFLAGS) -c -o $@ $<

## man: the man pages, into target/man
man: $(MAN)/.built

# Their writer needs rustc alone. The date in their margins is that of the last change of a text, not of the build.
$(MAN)/.built: $(MAN_TEXTS) $(wildcard man/*.rs) Cargo.toml Makefile
	rm -rf $(MAN)
	mkdir -p $(MAN)
	$(RUSTC) --edition 2024 -Dwarnings -o $(MAN)/pages man/main.rs
	changed=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct -- $(MAN_TEXTS) 2>/dev/null || true)}; \
	    $(MAN)/pages $(MAN) $(VERSION) "$$(date -u -d "@$${changed:-$$(stat -c %Y include/vmig.h)}" +%F)"
	touch $@

# With another choice of programs they are built anew.
BUILT := .built$(if $(RDMA),-rdma)

# $(call programs,directory,library,extra flags): all C programs, from scratch, for they are few and small.
define programs
	rm -rf $(1)
	mkdir -p $(1)
	$(if $(wildcard c-examples/vmm/Makefile),+$(MAKE) --no-print-directory -C c-examples/vmm OUT=$(1) \
	    CFLAGS="$(CFLAGS) $(3)" VMIG_CFLAGS="-I$(CURDIR)/include" VMIG_LIBS="$(2) $(LIBS_PRIVATE)")
	$(if $(RDMA),$(CC) $(WARN) $(CFLAGS) $(3) -Iinclude -o $(1)/rdma c-examples/rdma.c $(2) $(LIBS_PRIVATE) -pthread -lrdmacm)
	+$(MAKE) --no-print-directory -C c-examples/emulator OUT=$(1) GUESTS_OPTIONAL=1 \
	    CFLAGS="$(CFLAGS) $(3)" VMIG_CFLAGS="-I$(CURDIR)/include" VMIG_LIBS="$(2) $(LIBS_PRIVATE)"
	for t in $(C_TESTS); do \
	    $(CC) $(WARN) $(CFLAGS) $(3) -Iinclude -o $(1)/$$t tests/c/$$t.c $(2) $(LIBS_PRIVATE) -pthread; \
	done
	touch $@
endef

## c: the C examples and test programs, into target/c (RDMA=1: the one that needs librdmacm, too)
c: $(C)/$(BUILT)
$(C)/$(BUILT): $(LIB) $(C_SOURCES) Makefile
	$(call programs,$(C),$(LIB),)

## c-asan: the same under AddressSanitizer and UndefinedBehaviorSanitizer, into target/c-asan
c-asan: $(C_ASAN)/$(BUILT)
$(C_ASAN)/$(BUILT): $(LIB) $(C_SOURCES) Makefile
	$(call programs,$(C_ASAN),$(LIB),$(SANITIZE))

## c-fault: the same with the library that loses a dirty bit or fails at a system call on purpose, into target/c-fault
c-fault: $(C_FAULT)/$(BUILT)
$(C_FAULT)/$(BUILT): $(LIB_FAULT) $(DOORS_OBJ) $(C_SOURCES) Makefile
	$(call programs,$(C_FAULT),$(DOORS_OBJ) $(LIB_FAULT),)

## check: all tests, samples drawn by a printed seed (VMIG_SEED=N repeats a run)
check: c c-asan c-fault man
	tests/run

## check-all: all tests, every point
check-all: c c-asan c-fault man
	VMIG_ALL=1 tests/run

## demo: a guest moves to another process while it runs (FAULT=drop-dirty: loses a page on purpose and must fail)
demo: $(if $(FAULT),c-fault,c)
	$(if $(FAULT),VMIG_FAULT=$(FAULT) $(C_FAULT)/demo,$(C)/demo) $(DEMO_ARGS)

## bench: speed, blackout and CPU time beside two stock QEMUs and the limit (ROWS=bulk,idle QUICK=1)
bench: c
	bench/run

## header: writes include/vmig.h and docs/options.md anew from the Rust sources
header:
	UPDATE_HEADER=1 $(CARGO) test --locked --test header --test docs the_

## install: header, libraries, vmig.pc, tool and man pages below PREFIX (also DESTDIR, LIBDIR, INCLUDEDIR, BINDIR, MANDIR)
install: build
	$(INSTALL) -d "$(DESTDIR)$(INCLUDEDIR)" "$(DESTDIR)$(LIBDIR)/pkgconfig" "$(DESTDIR)$(BINDIR)"
	$(INSTALL) -m 755 $(TOOL) "$(DESTDIR)$(BINDIR)/vmig"
	$(INSTALL) -m 644 include/vmig.h "$(DESTDIR)$(INCLUDEDIR)/vmig.h"
	$(INSTALL) -m 644 $(LIB) "$(DESTDIR)$(LIBDIR)/libvmig.a"
	$(INSTALL) -m 755 $(SHARED) "$(DESTDIR)$(LIBDIR)/libvmig.so.$(VERSION)"
	ln -sf libvmig.so.$(VERSION) "$(DESTDIR)$(LIBDIR)/$(SONAME)"
	ln -sf $(SONAME) "$(DESTDIR)$(LIBDIR)/libvmig.so"
	for part in man1 man3 man7; do \
	    $(INSTALL) -d "$(DESTDIR)$(MANDIR)/$$part"; \
	    $(INSTALL) -m 644 $(MAN)/$$part/* "$(DESTDIR)$(MANDIR)/$$part"; \
	done
	for pc in vmig vmig-static; do \
	    sed -e 's|@PREFIX@|$${pcfiledir}/$(shell realpath -m --relative-to="$(LIBDIR)/pkgconfig" "$(PREFIX)")|' \
	        -e 's|@LIBDIR@|$${prefix}/$(shell realpath -m --relative-to="$(PREFIX)" "$(LIBDIR)")|' \
	        -e 's|@INCLUDEDIR@|$${prefix}/$(shell realpath -m --relative-to="$(PREFIX)" "$(INCLUDEDIR)")|' \
	        -e 's|@VERSION@|$(VERSION)|' -e 's|@LIBS_PRIVATE@|$(LIBS_PRIVATE)|' $$pc.pc.in \
	        >"$(DESTDIR)$(LIBDIR)/pkgconfig/$$pc.pc"; \
	done

## uninstall: removes what install put there (same PREFIX, DESTDIR, LIBDIR, INCLUDEDIR, BINDIR, MANDIR)
uninstall: man
	cd $(MAN); for page in man1/* man3/* man7/*; do rm -f "$(DESTDIR)$(MANDIR)/$$page"; done
	rm -f "$(DESTDIR)$(BINDIR)/vmig" "$(DESTDIR)$(INCLUDEDIR)/vmig.h" "$(DESTDIR)$(LIBDIR)"/libvmig.{a,so,so.$(VERSION)} \
	    "$(DESTDIR)$(LIBDIR)/$(SONAME)" "$(DESTDIR)$(LIBDIR)"/pkgconfig/vmig{,-static}.pc

## fmt: formats the Rust sources
fmt:
	$(CARGO) fmt

## lint: formatting and clippy, as the gate wants them
lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings

## doc: the Rust documentation, into target/doc
doc:
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --locked --no-deps

## clean: removes everything that was built
clean:
	$(CARGO) clean

## help: this list
help:
	@sed -n 's/^## /  make /p' $(firstword $(MAKEFILE_LIST))
