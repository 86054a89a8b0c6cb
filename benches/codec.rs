//! Records of the ram section: what a page costs beside its bytes.
#![allow(missing_docs, reason = "criterion's macros write functions without")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vmig::ram::PAGE;
use vmig::wire::input::Slice;
use vmig::wire::ram::{self, Record};

const RECORDS: u64 = 4096;

fn encode(out: &mut Vec<u8>, zero: bool) {
    for page in 0..RECORDS {
        let name = (page == 0).then_some("pc.ram");
        let put = if zero { ram::put_zero } else { ram::put_page };
        put(out, name, page * PAGE).expect("a short name");
    }
    ram::put_end(out);
}

fn decode(bytes: &[u8]) -> u64 {
    let mut input = Slice::new(bytes);
    let mut records = 0;
    while ram::read(&mut input).expect("what was written") != Record::End {
        records += 1;
    }
    records
}

fn codec(c: &mut Criterion) {
    for (name, zero) in [("records of pages", false), ("records of zero pages", true)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(RECORDS));
        let mut out = Vec::new();
        group.bench_function("encode", |b| {
            b.iter(|| {
                out.clear();
                encode(black_box(&mut out), zero);
            });
        });
        group.bench_function("decode", |b| b.iter(|| assert_eq!(decode(black_box(&out)), RECORDS)));
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
    targets = codec
}
criterion_main!(benches);
