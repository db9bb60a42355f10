//! `/tokenize` and `/detokenize`, in vLLM's shapes.

use std::sync::Arc;

use kvmesh_wire::v1::{self, tokenize_request::Input};
use serde::Serialize;

use super::{ask, fields::Fields, prompt::Prompt, tools::Tools};
use crate::{
    door::{self, Refused},
    error::RequestError,
    serve::{Call, Shared},
    telemetry::Step,
};

#[derive(Debug, Serialize)]
pub(super) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
pub(super) struct Detokenized {
    prompt: String,
}

fn invalid(error: RequestError) -> Refused {
    (Step::Validate, error)
}

/// Token ids of a text or a chat.
pub(super) async fn tokenize(shared: &Arc<Shared>, call: Call) -> Result<Tokenized, Refused> {
    let _entered = shared.enter(&call)?;
    let read = shared
        .door
        .read_json(&call.headers, call.body, Fields::read)
        .await?;
    let (mut fields, permit) = read.split();
    ask::known(&fields).map_err(invalid)?;
    let name = fields.model.take().unwrap_or_default();
    // Adapters have their model's tokeniser.
    let model = door::named(&shared.mesh, &name).map_err(invalid)?.model;
    let strings = fields.return_token_strs.unwrap_or(false);
    let input = match (fields.prompt.take(), fields.messages.is_some()) {
        (None, true) => {
            let tools = Tools::take(&mut fields).map_err(invalid)?;
            Input::Chat(ask::chat(&mut fields, tools.as_ref()).map_err(invalid)?)
        }
        (Some(Prompt::Text(text)), false) => {
            ask::no_chat(&fields).map_err(invalid)?;
            ask::added_tokens(&fields, true).map_err(invalid)?;
            Input::Prompt(text)
        }
        (Some(Prompt::Text(_)), true) | (None, false) => {
            let error = RequestError::invalid("prompt", "one of prompt and messages is required");
            return Err(invalid(error));
        }
        (Some(_), _) => return Err(invalid(RequestError::invalid("prompt", "a text"))),
    };
    let request = v1::TokenizeRequest {
        model: model.clone(),
        input: Some(input),
    };
    let answer = shared.door.tokenize(permit.around(request)).await?;
    let token_strs = match strings {
        false => None,
        true => {
            let served = shared.mesh.model(&model).map_err(invalid)?;
            let name = |id: &u32| {
                let bytes = served.text.token_bytes(*id).unwrap_or_default();
                String::from_utf8_lossy(bytes).into_owned()
            };
            Some(answer.ids.iter().map(name).collect())
        }
    };
    Ok(Tokenized {
        count: answer.ids.len(),
        max_model_len: answer.context_length,
        tokens: answer.ids,
        token_strs,
    })
}

/// Text of token ids, special ones included.
pub(super) async fn detokenize(shared: &Arc<Shared>, call: Call) -> Result<Detokenized, Refused> {
    let _entered = shared.enter(&call)?;
    let read = shared
        .door
        .read_json(&call.headers, call.body, Fields::read)
        .await?;
    let (fields, permit) = read.split();
    ask::known(&fields).map_err(invalid)?;
    let name = fields.model.unwrap_or_default();
    let model = door::named(&shared.mesh, &name).map_err(invalid)?.model;
    let ids = fields
        .tokens
        .ok_or_else(|| invalid(RequestError::invalid("tokens", "required")))?;
    let context = shared
        .mesh
        .model(&model)
        .map_err(invalid)?
        .record
        .context_length;
    if ids.len() > context as usize {
        let allowed = format!("{} ids; the context has {context}", ids.len());
        return Err(invalid(RequestError::invalid("tokens", allowed)));
    }
    let prompt = shared.door.detokenize(&model, permit.around(ids)).await?;
    Ok(Detokenized { prompt })
}
