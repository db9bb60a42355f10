//! How fast text goes in and out on one core: `cargo run --release -p
//! kvmesh-text --example text_speed -- tokenizer.json`.
#![allow(clippy::unwrap_used)]

use kvmesh_text::{Limits, ModelText, TextFile, TextSettings};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let file = TextFile {
        name: "tokenizer.json".to_owned(),
        bytes: std::fs::read(path).unwrap(),
    };
    let begin = Instant::now();
    let model = ModelText::from_files(&[file], &Limits::default()).unwrap();
    println!("load: {:.0} ms", begin.elapsed().as_secs_f64() * 1e3);

    let text = "The quick brown fox doesn't jump over 13 lazy dogs; être ou ne pas être, 你好.\n"
        .repeat(400);
    let begin = Instant::now();
    let ids = model
        .encode_rendered(&text, &AtomicBool::new(false))
        .unwrap();
    let took = begin.elapsed().as_secs_f64();
    println!("encode: {} ids in {:.1} ms", ids.len(), took * 1e3);

    let few: Vec<String> = ["\n\nUser:", "<|end|>", "###", "Observation:"]
        .map(str::to_owned)
        .into();
    let many: Vec<String> = (0..64).map(|n| format!("e{n} a stop string")).collect();
    for (what, stops) in [("no", Vec::new()), ("4", few), ("64", many)] {
        let settings = TextSettings {
            stops,
            ..TextSettings::default()
        };
        let rounds = 100;
        let begin = Instant::now();
        for _ in 0..rounds {
            let mut stream = model.stream(&settings).unwrap();
            let mut out = String::new();
            for id in &ids {
                out.clear();
                stream.push(std::slice::from_ref(id), &mut out);
            }
            stream.finish(&mut out);
        }
        let nanoseconds =
            begin.elapsed().as_secs_f64() * 1e9 / f64::from(rounds) / ids.len() as f64;
        println!("decode with {what} stop strings: {nanoseconds:.0} ns a token");
    }
}
