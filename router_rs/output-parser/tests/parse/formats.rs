//! Formats by their names and by templates.

use kvmesh_output_parser::{ReasoningFormat, ToolFormat};

#[test]
fn formats_are_known_by_their_templates() {
    for (template, tools, thoughts) in [
        (
            "{{'<tool_call>'}} {{ '</think>' }}",
            Some(ToolFormat::Hermes),
            Some(ReasoningFormat::Think),
        ),
        (
            "<tool_call>\n<function=name>\n<parameter=a>",
            Some(ToolFormat::Qwen3Coder),
            None,
        ),
        (
            "'\n<tool_call>' + tc.name <arg_key>{{ k }}</arg_key> '</think>'",
            Some(ToolFormat::Glm45),
            Some(ReasoningFormat::Think),
        ),
        (
            "<|start_header_id|> \"parameters\" [func_name1(params_name1=params_value1), func(p)]",
            Some(ToolFormat::Pythonic),
            None,
        ),
        // Nemotron's are between marks of their own.
        (
            "<TOOLCALL>[func_name1(params_name1=params_value1)]</TOOLCALL>",
            None,
            None,
        ),
        (
            "<|header_start|> {\"name\": n, \"parameters\": p}",
            Some(ToolFormat::Llama3),
            None,
        ),
        (
            "[TOOL_CALLS] [THINK]",
            Some(ToolFormat::Mistral),
            Some(ReasoningFormat::Mistral),
        ),
        (
            "<|start|><|channel|><|message|>",
            Some(ToolFormat::Harmony),
            Some(ReasoningFormat::Harmony),
        ),
        (
            "<｜tool▁call▁begin｜> </think>",
            Some(ToolFormat::DeepSeek),
            Some(ReasoningFormat::Think),
        ),
        (
            "<|start_header_id|> <|python_tag|>",
            Some(ToolFormat::Llama3),
            None,
        ),
        (
            "<|start_header_id|> {\"name\": n, \"parameters\": p}",
            Some(ToolFormat::Llama3),
            None,
        ),
        ("<|im_start|>{{ message }}<|im_end|>", None, None),
    ] {
        assert_eq!(ToolFormat::of_template(template), tools, "{template}");
        assert_eq!(
            ReasoningFormat::of_template(template),
            thoughts,
            "{template}"
        );
    }
    for format in ToolFormat::ALL {
        assert_eq!(format.name().parse(), Ok(format));
    }
    for format in ReasoningFormat::ALL {
        assert_eq!(format.name().parse(), Ok(format));
    }
    let unknown = "hermse".parse::<ToolFormat>().unwrap_err().to_string();
    assert!(
        unknown.contains("hermse") && unknown.contains("hermes, llama3"),
        "{unknown}"
    );
}
