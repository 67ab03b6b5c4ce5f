//! What a client is told, where the modes agree.

use evergate_core::chat::{self, Reply};
use evergate_core::{Error, Fault, json};
use evergate_sys::Status;

use crate::ask::{self, Ask, Endpoint};

/// An end that came before the answer's; none when the program was lost to a defect of ours.
pub(crate) fn exited(status: Option<Status>) -> Error {
    let lost = || Error::new(Fault::Internal, "the program of this model was lost");
    status.map_or_else(lost, ask::exited)
}

/// An answer to a request, without its text.
pub(crate) fn reply(ask: &Ask) -> Reply {
    let prefix = if ask.endpoint == Endpoint::Chat { "chatcmpl-" } else { "cmpl-" };
    let tokens_in = json::messages_text(&ask.body).map(|text| chat::count_tokens(&text)).unwrap_or(0);
    Reply {
        id: format!("{prefix}{}", ask.id),
        created: evergate_sys::unix_ms() / 1000,
        model: ask.request.model.clone(),
        text: String::new(),
        tokens_in: Some(tokens_in),
        wants_usage: ask.request.wants_usage,
    }
}
