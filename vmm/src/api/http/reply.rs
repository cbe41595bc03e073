//! What is answered: complete, or piece by piece.

/// The reason phrase of a status that we send.
const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Internal Server Error",
    }
}

/// The media type of almost all that is answered.
pub const JSON: &str = "application/json";

/// A complete reply, ready to write. `body` is its media type and its bytes, and `None` for 204.
#[must_use]
pub fn reply(
    status: u16,
    allow: Option<&str>,
    body: Option<(&str, &[u8])>,
    head_only: bool,
    keep_alive: bool,
) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} {}\r\nServer: ferry\r\n", reason(status));
    if let Some(methods) = allow {
        text.push_str(&format!("Allow: {methods}\r\n"));
    }
    if let Some((content, body)) = body {
        text.push_str(&format!(
            "Content-Type: {content}\r\nContent-Length: {}\r\n",
            body.len()
        ));
    }
    text.push_str(if keep_alive {
        "Connection: keep-alive\r\n\r\n"
    } else {
        "Connection: close\r\n\r\n"
    });
    let mut bytes = text.into_bytes();
    if let (Some((_, body)), false) = (body, head_only) {
        bytes.extend_from_slice(body);
    }
    bytes
}

/// The head of a stream of JSON lines: chunked, or until the connection closes for HTTP/1.0.
#[must_use]
pub fn stream_head(content: &str, chunked: bool) -> Vec<u8> {
    let framing = if chunked {
        "Transfer-Encoding: chunked\r\n"
    } else {
        ""
    };
    format!(
        "HTTP/1.1 200 OK\r\nServer: ferry\r\nContent-Type: {content}\r\nCache-Control: no-store\r\n\
         {framing}Connection: close\r\n\r\n"
    )
    .into_bytes()
}

/// One piece of a stream.
#[must_use]
pub fn chunk(bytes: &[u8], chunked: bool) -> Vec<u8> {
    if !chunked {
        return bytes.to_vec();
    }
    let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(b"\r\n");
    framed
}
