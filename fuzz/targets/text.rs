//! Tokeniser files and chat templates of workers, and text through them.
//!
//! What loads works: a prompt becomes ids or an error, the ids' text is the same
//! however they come in, and no template runs for long.
#![no_main]

use kvmesh_fuzz::messages;
use kvmesh_output_parser::{
    Calls, Events, Expected, OutputParser, ReasoningFormat, Tool, ToolFormat,
};
use kvmesh_text::{Chat, Limits, Message, ModelText, TextFile, TextSettings, UnixSeconds};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use std::sync::{Arc, atomic::AtomicBool};

const NAMES: [&str; 3] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// The tokeniser that is taken where an input brings none: a small one.
const BUILT_IN: &str = include_str!("../../router_rs/text/tests/data/byte_level.json");

fn limits() -> Limits {
    Limits {
        template_fuel: 20_000,
        rendered_bytes: 1 << 16,
        ..Limits::default()
    }
}

fuzz_target!(|data: &[u8]| {
    let mut messages = messages(data);
    let mut files = Vec::new();
    for name in NAMES {
        let bytes = messages.next().unwrap_or_default();
        if !bytes.is_empty() {
            files.push(TextFile {
                name: name.to_owned(),
                bytes: bytes.to_vec(),
            });
        } else if name == NAMES[0] {
            files.push(TextFile {
                name: name.to_owned(),
                bytes: BUILT_IN.into(),
            });
        }
    }
    let Ok(model) = ModelText::from_files(&files, &limits()) else {
        return;
    };
    let text = String::from_utf8_lossy(messages.next().unwrap_or_default());
    let json = String::from_utf8_lossy(messages.next().unwrap_or_default());
    let never = AtomicBool::new(false);

    let mut chat = Chat::new(vec![
        Message::new("system", "Be brief."),
        Message::new("user", text.as_ref()),
    ]);
    let _ = chat.set_arguments(&json);
    let _ = chat.add_tool(&json);
    if let Ok(rendered) = model.render_chat(&chat, UnixSeconds(1_700_000_000)) {
        assert!(rendered.len() <= limits().rendered_bytes);
        let _ = model.encode_rendered(&rendered, &never);
    }

    let Ok(mut ids) = model.encode(&text, &never) else {
        return;
    };
    // And what no tokeniser makes, some of it outside the vocabulary.
    ids.extend(data.iter().take(64).map(|byte| u32::from(*byte) * 3));
    let settings = TextSettings {
        special_tokens: data.len() % 2 == 0,
        kept_special_tokens: vec!["<s>".to_owned(), "stop".to_owned()],
        stops: vec!["stop".to_owned(), "é".to_owned()],
        include_stop: data.len() % 3 == 0,
        min_tokens: 0,
    };
    let read = |size: usize| {
        let mut stream = model.stream(&settings).expect("these stops are allowed");
        let mut out = String::new();
        for part in ids.chunks(size) {
            if let Some(hit) = stream.push(part, &mut out) {
                return (out, Some(hit.stop));
            }
        }
        stream.finish(&mut out);
        (out, None)
    };
    assert_eq!(read(1), read(7));
    read_output(&text, data.len());
});

/// What is found in an output does not depend on how it is cut.
fn read_output(text: &str, which: usize) {
    let schema = json!({"properties": {"a": {"type": "string"}, "b": {"type": "array"}}});
    let tools: Arc<[Tool]> = [Tool::new("f", &schema)].into();
    let native = ToolFormat::ALL.map(|format| Calls::Native {
        format,
        tools: Arc::clone(&tools),
    });
    let others = [Calls::None, Calls::List, Calls::One("f".to_owned())];
    let calls: Vec<Calls> = native.into_iter().chain(others).collect();
    let expected = Expected {
        reasoning: ReasoningFormat::ALL.get(which % 4).copied(),
        calls: calls[which % calls.len()].clone(),
        constrained: which % 2 == 0,
    };
    let parsed = |pieces: &[&str]| {
        let mut parser = OutputParser::new(&expected, if which % 3 == 0 { "<think>" } else { "" });
        let mut out = Events::default();
        for piece in pieces {
            parser.push(piece, &mut out);
        }
        parser.finish(&mut out);
        out
    };
    let letters: Vec<&str> = text.split("").collect();
    assert_eq!(parsed(&[text]), parsed(&letters));
}
